"""Write the results of a test as a web page: pass rates, success criteria, every answer.

Needs   test_results.json, which test_model.py leaves (with ratings, after judge_answers.py).
Leaves  report.html: one file that loads nothing, to open in a browser or to send to somebody.
Omits   comparing several tests.

    python extras/report_page.py        # or: ... report_page.py round_2.json --output round_2.html
"""

import argparse
import json
import sys
from datetime import datetime
from html import escape  # every text of a model goes through it, so that none becomes markup
from pathlib import Path
from string import Template

SIDES = ("base", "fine_tuned")
OUTCOMES = ("broken", "fixed", "still failing", "still passing")  # the order of the cases
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$verdict</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --dim: #57606a; --card: #f0f3f6;
  --base: #8c959f; --tuned: #0969da; --good: #1a7f37; --bad: #cf222e; --warn: #8a5a00 }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --dim: #9198a1;
  --card: #1c222b; --tuned: #4493f8; --good: #3fb950; --bad: #f85149; --warn: #d29922 } }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h3 { margin: .6rem 0 .2rem; font-size: .9rem; color: var(--dim) } p { margin: .3rem 0 }
.good, .fixed { color: var(--good) } .bad, .broken { color: var(--bad) }
.still-failing { color: var(--warn) } .dim, .still-passing { color: var(--dim) }
.pair { display: grid; grid-template-columns: 9rem 1fr 9rem; gap: 0 .8rem; margin: .8rem 0 }
.pair b { grid-row: span 2 } .pair * { align-self: center } .pair div { background: var(--card) }
i { display: block; height: .8rem } .base { background: var(--base) }
.fine_tuned { background: var(--tuned) } .key { display: inline-block; width: .8rem }
.pair span, output { white-space: nowrap }
form { position: sticky; top: 0; padding: .6rem 0; background: var(--back) }
button, select { max-width: 100%; margin: .1rem; padding: .25rem .7rem;
  border: 1px solid var(--dim); border-radius: 1rem; background: var(--card); font: inherit }
button[aria-pressed=true] { background: var(--text); color: var(--back) }
details { margin: .6rem 0; padding: .5rem .8rem; border: 1px solid var(--dim); border-radius: 6px }
.answers { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 1rem }
pre { margin: 0; padding: .6rem; background: var(--card); font: inherit; white-space: pre-wrap }
@media (max-width: 44rem) { .answers { grid-template-columns: minmax(0, 1fr) }
  .pair { grid-template-columns: 1fr 9rem } .pair b { grid-row: auto; grid-column: span 2 } }
</style></head><body><h1>Verdict: $verdict</h1><p>$sentence</p><p class="dim">$about</p>
<p><i class="base key"></i> $other $base_model<br>
<i class="fine_tuned key"></i> fine-tuned $model</p>$bars<h2>Success criteria</h2><ul>$criteria</ul>
<h2>Cases</h2><form>$buttons<select aria-label="Category"><option value="">all categories</option>
$categories</select> <output></output></form><main>$cards</main>
<script>
const cards = [...document.querySelectorAll("details")], select = document.querySelector("select");
const buttons = [...document.querySelectorAll("button")], count = document.querySelector("output");
function show(chosen) {
  for (const card of cards)
    card.hidden = chosen && card.dataset.outcome !== chosen
      || select.value && card.dataset.category !== select.value;
  for (const button of buttons) button.ariaPressed = button.value === chosen;
  count.textContent = `$${cards.filter(card => !card.hidden).length} of $${cards.length}`;
}
for (const button of buttons) button.onclick = () => show(button.value);
select.onchange = () => show(buttons.find(button => button.ariaPressed === "true").value);
show("");
</script></body></html>
""")


def bars(name: str, counts: dict) -> str:
    """Return the pass rates of both models, one bar under the other."""
    rows = ""
    for side in SIDES:
        passed, cases = counts[side]["passed"], counts[side]["cases"]
        share = passed / max(cases, 1)
        rows += f'<div><i class="{side}" style="width: {share:.1%}"></i></div>'
        rows += f"<span>{passed} of {cases} ({share:.0%})</span>"
    return f'<section class="pair"><b>{escape(name)}</b>{rows}</section>'


def criterion_line(of: dict) -> str:
    """Return a success criterion: what was reached, and what was asked for."""
    mark = '<span class="good">✓ met</span>' if of["met"] else '<span class="bad">✗ not met</span>'
    line = f"{mark}: {escape(of['name'])}, {of['passed']} of {of['cases']}"
    line += f" (asked: {of['min_pass_rate']:.0%} of at least {of.get('min_cases', 1)} cases)"
    if of.get("judge") and of.get("judge_mean"):
        line += f"; {of['judge']} rated {of['judge_mean']:.1f} (asked: {of['min_judge_mean']:g})"
    return f"<li>{line}</li>"


def what_is_wrong(answer: dict) -> str:
    """Return why an answer failed; a check's name says in words what its pattern looks for."""
    if answer["error"] or answer.get("problem"):
        return answer["error"] or answer["problem"]
    failed = [check for check in answer["checks"] if not check["passed"]]
    return "; ".join(check.get("name") or check["problem"] for check in failed)


def show_answer(whose: str, answer: dict, text: str) -> str:
    """Return one model's answer, whether it passed, and how a judge has rated it."""
    mark = '<b class="good">passed</b>' if answer["passed"] else '<b class="bad">failed</b>'
    heading = f"{whose.capitalize()}: {mark}"
    if answer.get("judged"):
        ratings = [f"{name[6:]} {answer[name]}" for name in answer if name.startswith("judge_")]
        heading += f" (judge: {', '.join(ratings)})"
    wrong = f'<p class="bad">{escape(what_is_wrong(answer))}</p>'
    return f"<section><h3>{heading}</h3>{wrong}<pre>{escape(text)}</pre></section>"


def card(result: dict, other: str) -> str:
    """Return one case: closed, it shows outcome, id and question; a broken one stands open."""
    outcome, name, asked = result["outcome"], escape(result["id"]), escape(result["question"])
    kind, category = outcome.replace(" ", "-"), escape(result["category"])
    head = f'<b class="{kind}">{outcome}</b> <span class="dim">{name}</span> {asked}'
    parts = [f"<summary>{head}</summary>"]
    for turn in result["history"]:
        parts.append(f"<h3>{escape(turn['role'])}</h3><pre>{escape(turn['content'])}</pre>")
    parts.append('<div class="answers">')
    parts.append(show_answer(other, result["base"], result["base_generated"]))
    parts.append(show_answer("fine-tuned", result["fine_tuned"], result["generated"]))
    parts.append(f"</div><h3>Expected</h3><pre>{escape(result['expected'] or '')}</pre>")
    is_open = " open" if outcome == "broken" else ""
    start = f'<details data-outcome="{kind}" data-category="{category}"{is_open}>'
    return start + "".join(parts) + "</details>"


def make_page(summary: dict, results: list[dict], tested: float) -> str:
    """Return the page; `tested`: when, in seconds since 1970."""
    when = datetime.fromtimestamp(tested)
    about = f"{len(results)} cases of {summary['cases_file']}, results of {when:%Y-%m-%d, %H:%M}"
    results = sorted(results, key=lambda result: OUTCOMES.index(result["outcome"]))
    buttons = '<button type="button" value="">all</button>'
    for outcome in OUTCOMES:
        kind = outcome.replace(" ", "-")
        buttons += f'<button type="button" class="{kind}" value="{kind}">{outcome}</button>'
    groups = {**summary["categories"], "all": summary}
    other = "other model" if summary["base_model"].startswith("ft:") else "base model"
    names = ("verdict", "sentence", "base_model", "model")
    return PAGE.substitute(
        {name: escape(summary[name]) for name in names},
        about=escape(about),
        bars="".join(bars(name, counts) for name, counts in groups.items()),
        criteria="".join(map(criterion_line, summary["criteria"])),
        buttons=buttons,
        categories="".join(f"<option>{escape(name)}</option>" for name in summary["categories"]),
        cards="".join(card(result, other) for result in results),
        other=other,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the results of a test as a web page.")
    parser.add_argument("results", nargs="?", default="test_results.json", help="of test_model.py")
    parser.add_argument("--output", default="report.html", help="default: %(default)s")
    args = parser.parse_args(argv)
    path = Path(args.results)
    if not path.exists():
        sys.exit(f"There is no {path} here: run python test_model.py first.")
    document = json.loads(path.read_bytes())
    tested = document["summary"].get("tested_at") or path.stat().st_mtime
    page = make_page(document["summary"], document["results"], tested)
    # A model may write half a character, which no file can hold: its code is written instead.
    Path(args.output).write_text(page, encoding="utf-8", errors="backslashreplace")
    print(f"Report: {args.output} (open it in a browser)")


if __name__ == "__main__":
    main()
