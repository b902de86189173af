"""Make anew what docs/ takes from the code and from the results kept in docs/run/.

    python docs/make.py      # or: make docs

docs/commands.md   every option and exit code, from the scripts' parsers
docs/loss.svg      what extras/plot_loss.py draws of docs/run/result.csv
docs/report.png    what extras/report_page.py writes of docs/run/test_results.json, as headless Chromium shows it;
                   without Chromium it is left as it is
"""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
RUN = DOCS / "run"
SCRIPTS = ("prepare_training_data", "fine_tune", "check_fine_tune_status", "use_fine_tuned_model", "test_model")
EXTRAS = ("extras/report_page", "extras/judge_answers", "extras/plot_loss", "extras/clean_up")
EXTRAS += ("extras/find_leaks", "extras/find_dirt")
PAGES = SCRIPTS + EXTRAS
EPOCHS = 3  # of the run in docs/run/result.csv
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
WINDOW = "900,745"  # pixels: as far down as the success criteria


def page(name: str):
    """Import one of the pages, "fine_tune" or "extras/plot_loss"."""
    if str(DOCS.parent) not in sys.path:
        sys.path.insert(0, str(DOCS.parent))
    return importlib.import_module(name.replace("/", "."))


def commands_page() -> str:
    """Return docs/commands.md: the options of the five scripts, and how each page of extras/ is called."""
    parts = [
        "# The commands\n",
        "Every option of the five scripts, and how to call each page of `extras/`; made of the scripts (`make docs`).",
        "What a script needs, leaves and omits stands in its first lines.\n",
        "Exit codes, everywhere: 0 done · 1 not, and the last line says why · 2 usage · 130 interrupted.",
    ]
    for name in SCRIPTS:
        module = page(name)
        title = (inspect.getdoc(module) or "").splitlines()[0]
        parts.append(f"\n## {name}.py\n\n{title}\n\n| argument | what it does |\n|---|---|")
        parts += map(option_row, module.build_parser()._actions[1:])  # the first is --help
    parts.append("\n## extras/\n")
    for name in EXTRAS:
        title, *lines = (inspect.getdoc(page(name)) or "").splitlines()
        calls = [line.split("#")[0].strip() for line in lines if line.startswith("    python")]
        parts.append(f"- {title} " + ", ".join(f"`{call}`" for call in calls))
    return "\n".join(parts) + "\n"


def option_row(action: argparse.Action) -> str:
    """Return a line of the table: `--flag` VALUE, or `ARGUMENT`, and its help."""
    value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
    flags = ", ".join(f"`{name}`" for name in action.option_strings)
    what = " ".join(((action.help or "") % vars(action)).split())  # %(default)s and the like
    return f"| {f'{flags} {value}'.strip() if flags else f'`{value}`'} | {what} |"


def loss_svg() -> str:
    """Return the loss curve of the kept result file."""
    with open(RUN / "result.csv", encoding="utf-8", newline="") as file:
        return page("extras/plot_loss").draw("Loss of the tutorial's job", list(csv.DictReader(file)), EPOCHS)


def report_html() -> str:
    """Return the report page of the kept test results."""
    path = RUN / "test_results.json"
    kept = json.loads(path.read_text("utf-8"))
    tested = kept["summary"].get("tested_at") or path.stat().st_mtime
    return page("extras/report_page").make_page(kept["summary"], kept["results"], tested)


def photograph(page: str, picture: Path) -> bool:
    """Save the top of an HTML page as PNG; False if there is no Chromium."""
    browser = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if browser is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder) / "report.html"
        html.write_text(page, encoding="utf-8")
        options = ("--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile")
        # Chromium's sandbox does not work in most containers, and the page is our own.
        command = [browser, *options, "--no-sandbox", f"--window-size={WINDOW}", f"--screenshot={picture}"]
        subprocess.run([*command, html.as_uri()], check=True, capture_output=True, timeout=120)
    return True


def main() -> int:
    (DOCS / "commands.md").write_text(commands_page(), encoding="utf-8")
    (DOCS / "loss.svg").write_text(loss_svg(), encoding="utf-8")
    print("docs/commands.md, docs/loss.svg: made")
    made = photograph(report_html(), DOCS / "report.png")
    print("docs/report.png:", "made" if made else "left as it is, there is no Chromium here")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
