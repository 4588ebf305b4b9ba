"""Everything that `make perf` measures, one table after another; about half an hour on two quiet cores.

`--quick`: the same calls on tiny input, to see that they work; its tables go to build/perf.
"""

import commands
import metrics
import overhead
import scale
import scaling
import survival
from measure import QUICK

metrics.main()
scaling.main()
scale.main()
survival.main()
commands.main(20 if QUICK else 1000)
overhead.main(*((160, 1) if QUICK else (2000, 3)))
