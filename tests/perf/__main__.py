"""Everything that `make perf` measures, one table after another; about half an hour on two cores."""

import commands
import metrics
import overhead

metrics.main()
commands.main()
overhead.main()
