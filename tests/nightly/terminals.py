"""Commands in a real terminal, and the terminal's state before and after each: in tmux as tmux tells it, in xterm as
xterm answers when it is asked.

As a program it is the one that a terminal runs: `python terminals.py tmux|xterm JOBS RESULTS`.
"""

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import termios
import time
import traceback
import tty
from pathlib import Path

PROGRAMS = {"tmux": {"tmux": "tmux"}, "xterm": {"xterm": "xterm", "Xvfb": "xvfb", "xclip": "xclip"}}
COLUMNS, LINES = 200, 50
FORMATS = (  # what tmux 3.3 tells of a pane
    *("pane_title", "window_name", "window_width", "window_height", "session_windows", "pane_in_mode", "alternate_on"),
    *("cursor_flag", "cursor_shape", "insert_flag", "keypad_cursor_flag", "keypad_flag", "origin_flag", "wrap_flag"),
    *(f"mouse_{kind}_flag" for kind in ("any", "all", "button", "sgr", "standard", "utf8")),
    *("scroll_region_upper", "scroll_region_lower", "pane_tabs"),
)
MODES = (1, 3, 5, 6, 7, 9, 12, 25, 45, 66, 69, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007, 1015, 1049, 2004)
TITLE, ICON, WINDOW, SIZE, CURSOR = "\x1b[21t", "\x1b[20t", "\x1b[11t", "\x1b[18t", "\x1b[1$w"
SETTINGS = ("r", "s", "m", " q", '"q')  # margins, colours and weight, cursor, protection
COLOURS = ("4;1", "10", "11", "12", "17", "19")
END = "\x1b[c"  # every terminal answers this; the answer is the last one
XTERM = {  # as open to what it is told as xterm can be
    "allowWindowOps": "true",
    "disallowedWindowOps": "",
    "allowTitleOps": "true",
    "disallowedColorOps": "",
    "allowColorOps": "true",
    "allowMouseOps": "true",
    "allowTcapOps": "true",
    "allowFontOps": "true",
    "disallowedPasteControls": "",
}


def missing(kind: str) -> str:
    """What to install; empty where all is there."""
    lacks = [package for name, package in PROGRAMS[kind].items() if shutil.which(name) is None]
    lacks += ["xfonts-base"] if kind == "xterm" and not Path("/usr/share/fonts/X11/misc").is_dir() else []
    return f"apt-get install {' '.join(lacks)}" if lacks else ""


def run(kind: str, jobs: list[dict], folder: Path, seconds: float = 600) -> list[dict]:
    """Runs the jobs, {argv, cwd}, one after another in one terminal. Gives for each the state before and after it, and
    in tmux the screen with what has left it."""
    folder.mkdir()
    given, told = folder / "jobs.json", folder / "results.json"
    given.write_text(json.dumps(jobs))
    argv = [sys.executable, __file__, kind, str(given), str(told)]
    env = {k: v for k, v in os.environ.items() if k not in ("TMUX", "DISPLAY")} | {"LC_ALL": "C.UTF-8"}
    (in_tmux if kind == "tmux" else in_xterm)(argv, folder, env, seconds, told)
    found = json.loads(told.read_text()) if told.exists() else "no result"
    assert isinstance(found, list), f"{kind}: {found}"
    return found


def in_tmux(argv, folder, env, seconds, told):
    options = (
        "set-clipboard on",
        "allow-rename on",
        "automatic-rename off",
        "allow-passthrough on",
        "history-limit 50000",
    )
    (folder / "tmux.conf").write_text("".join(f"set -g {option}\n" for option in options))
    tmux = ["tmux", "-S", str(folder / "socket"), "-f", str(folder / "tmux.conf")]
    size = ["-x", str(COLUMNS), "-y", str(LINES)]
    try:
        subprocess.run([*tmux, "new-session", "-d", *size, *argv], env=env, check=True, timeout=30)
        until = time.monotonic() + seconds
        while not told.exists() and time.monotonic() < until:
            time.sleep(0.2)
    finally:
        subprocess.run([*tmux, "kill-server"], env=env, capture_output=True, timeout=30)


def in_xterm(argv, folder, env, seconds, told):
    reader, writer = os.pipe()
    with open(folder / "errors", "wb") as errors:
        screen = ["Xvfb", "-displayfd", str(writer), "-screen", "0", "1600x1000x24", "-nolisten", "tcp"]
        server = subprocess.Popen(screen, pass_fds=[writer], stdout=errors, stderr=errors)
        os.close(writer)
        try:
            with os.fdopen(reader) as pipe:
                display = f":{pipe.readline().strip()}"
            options = [part for name, value in XTERM.items() for part in ("-xrm", f"XTerm*{name}: {value}")]
            where = ["-u8", "-geometry", f"{COLUMNS}x{LINES}", "-e", *argv]
            terminal = ["xterm", *options, *where]
            subprocess.run(terminal, env={**env, "DISPLAY": display}, stdout=errors, stderr=errors, timeout=seconds)
        finally:
            server.terminate()
            server.wait()


# -- within the terminal


@contextlib.contextmanager
def raw():
    """What is typed comes at once, is not echoed, and what was typed before is kept."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def ask(text: str, end: str, seconds: float = 5.0) -> str:
    """Writes to the terminal and gives what it sends until `end` matches; all that is waiting where `end` is empty."""
    said = ""
    os.write(1, text.encode())
    until = time.monotonic() + (seconds if end else 0.1)
    while not (end and re.search(end, said)) and time.monotonic() < until:
        if select.select([0], [], [], 0.05)[0]:
            said += os.read(0, 65536).decode("utf-8", "replace")
    return said


def tmux(*argv: str) -> str:
    return subprocess.run(["tmux", *argv], capture_output=True, text=True, errors="replace", timeout=30).stdout


def state_of_tmux() -> dict:
    state = {"typed": ask("", "")}
    values = tmux("display-message", "-p", "\t".join(f"#{{{f}}}" for f in FORMATS)).rstrip("\n").split("\t")
    state |= dict(zip(FORMATS, values, strict=False))
    names = tmux("list-buffers", "-F", "#{buffer_name}").split()
    state["clipboard"] = [tmux("show-buffer", "-b", name) for name in names]
    tmux("set-buffer", "-b", "probe", "paste")
    tmux("paste-buffer", "-p", "-d", "-b", "probe")  # in brackets where a program asked for them
    state["paste"] = ask("", "paste.*")
    os.write(1, b"\r\nlqk")  # corners and a line, where another character set is chosen
    state["letters"] = tmux("capture-pane", "-p", "-e").rstrip().rpartition("\n")[2]
    os.write(1, b"\r\n")
    return state


def state_of_xterm() -> dict:
    state = {"typed": ask("", "")}
    questions = [TITLE, ICON, WINDOW, SIZE, "\x1b[2$w"]
    questions += [f"\x1b[?{n}$p" for n in MODES] + ["\x1b[4$p", "\x1b[20$p"]
    questions += [f"\x1bP$q{s}\x1b\\" for s in SETTINGS] + [f"\x1b]{c};?\x1b\\" for c in COLOURS]
    for question in questions:
        state[question[1:].rstrip("\x1b\\")] = ask(question + END, r"\x1b\[\?[\d;]+c").rpartition("\x1b[?")[0]
    for name in ("clipboard", "primary"):  # xterm 379 itself dies of the question
        argv = ["xclip", "-selection", name, "-o"]
        state[name] = subprocess.run(argv, capture_output=True, text=True, timeout=30).stdout
    cursor = ask(CURSOR + END, r"\x1b\[\?[\d;]+c").rpartition("\x1b[?")[0]
    state["character set"] = re.sub(r"\$u\d+;\d+;", "$u", cursor)  # but not where the cursor is
    return state


def main(kind: str, jobs: str, results: str) -> None:
    try:
        found = work(kind, json.loads(Path(jobs).read_text()))
    except Exception:
        found = traceback.format_exc()
    Path(results + ".new").write_text(json.dumps(found))
    os.rename(results + ".new", results)


def work(kind: str, jobs: list[dict]) -> list[dict]:
    look = {"tmux": state_of_tmux, "xterm": state_of_xterm}[kind]
    found = []
    for job in jobs:
        os.write(1, b"\x1bc\x1b[H\x1b[2J")  # what one job did to the terminal is not found again at the next
        if kind == "tmux":
            tmux("clear-history")
        with raw():
            before = look()
        code = subprocess.run(job["argv"], cwd=job["cwd"], timeout=120).returncode
        screen = tmux("capture-pane", "-p", "-J", "-S", "-") if kind == "tmux" else ""
        with raw():
            after = look()
        found.append({"code": code, "before": before, "after": after, "screen": screen})
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
