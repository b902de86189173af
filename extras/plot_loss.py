"""Draw the loss of a fine-tuning job: each step a dot, their average a line, each epoch marked.

Needs   a job that has done some steps: its id, or the record of it in fine_tune_job.json.
Leaves  loss.svg, which browsers show, light or dark as they are set. Omits token accuracy.

    python extras/plot_loss.py           # the latest job; or: ... plot_loss.py ftjob-abc123
"""

import argparse
import base64
import csv
import json
import math
import sys
from pathlib import Path

try:
    import openai
    from dotenv import load_dotenv
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing: activate .venv, or pip install -r requirements.txt")

HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 400" text-anchor="middle"><style>
svg { color: #1b1f24; background: #fff } text { font: 13px sans-serif; fill: currentColor }
path { fill: none; stroke: currentColor; stroke-width: 2.5; stroke-linecap: round }
.grid, .epoch { stroke-width: 1; opacity: .3 } .epoch { stroke-dasharray: 4 }
.dots { color: #6e7781 } .train { color: #0969da } .valid { color: #bc4c00 }
@media (prefers-color-scheme: dark) { svg { color: #e6edf3; background: #0d1117 }
.train { color: #58a6ff } .valid { color: #ff9d5c } } </style><text x="190" y="24">TITLE</text>
<text transform="rotate(-90)" x="-200" y="18">loss</text><text x="380" y="390">training step</text>
<text x="420" y="24" class="dots">a step</text><text x="510" y="24" class="train">average</text>"""


def read_steps(client: openai.OpenAI, job) -> list[dict]:
    """Return [{"step", "train_loss", ...}] from the job's result file, or else from its events."""
    if job.result_files:
        content = client.files.content(job.result_files[0]).content
        if b"," not in content:  # OpenAI sends its CSV in Base64, which has no comma
            content = base64.b64decode(content)
        return list(csv.DictReader(content.decode("utf-8-sig").splitlines()))
    events = client.fine_tuning.jobs.list_events(job.id, limit=100)
    return [event.data for event in events if isinstance(event.data, dict) and "step" in event.data]


def curve(steps: list[dict], name: str) -> list[tuple[float, float]]:
    """Return [(step, loss)] in order, without the missing ones: null, NaN or, on Azure, -1."""
    points = []
    for figures in steps:
        if figures.get(name) not in (None, "") and 0 <= float(figures[name]) < math.inf:
            points.append((float(figures["step"]), float(figures[name])))
    return sorted(points)


def draw(title: str, steps: list[dict], epochs: object) -> str:
    """Return the picture (SVG), in which the plot takes 640 by 280 pixels."""
    train = curve(steps, "train_loss")
    valid = curve(steps, "full_valid_loss") or curve(steps, "valid_loss")
    if not train:
        sys.exit("There is no loss to draw yet: wait for the first steps.")
    last = max(float(figures.get("total_steps") or figures["step"]) for figures in steps) or 1
    top = math.ceil(max(loss for _, loss in train + valid)) or 1
    parts = [HEAD.replace("TITLE", title)]

    def path(points: list, kind: str, join: str = "L") -> None:
        pixels = [f"{60 + 640 * x / last:.1f},{340 - 280 * y / top:.1f}" for x, y in points]
        parts.append(f'<path class="{kind}" d="M{join.join(pixels)}"/>')

    for loss in (0, top / 4, top / 2, top * 3 / 4, top):
        path([(0, loss), (last, loss)], "grid")
        parts.append(f'<text x="42" y="{344 - 280 * loss / top:.0f}">{loss:g}</text>')
    names = [f"epoch {n + 1}" for n in range(epochs)] if isinstance(epochs, int) else ["all epochs"]
    for number, name in enumerate(names, 1):
        end, width = last * number / len(names), 640 / len(names)
        path([(end, 0), (end, top)], "epoch")
        parts.append(f'<text x="{60 + width * number:.0f}" y="360">{end:.0f}</text>')
        parts.append(f'<text x="{60 + width * (number - 0.5):.0f}" y="54">{name}</text>')
    path(train, "dots", "h0M")  # a line of length 0 is a dot
    reach, means = len(train) // 20, []
    for number, (step, _) in enumerate(train):  # the mean of the tenth of all steps around this one
        near = [loss for _, loss in train[max(0, number - reach) : number + reach + 1]]
        means.append((step, sum(near) / len(near)))
    path(means, "train")
    if valid:
        path(valid, "valid")
        parts.append('<text x="610" y="24" class="valid">validation</text>')
    return "\n".join([*parts, "</svg>\n"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the loss of a fine-tuning job.")
    parser.add_argument("job_id", nargs="?", help="default: the job in fine_tune_job.json")
    parser.add_argument("--output", default="loss.svg", metavar="FILE", help="default: %(default)s")
    args = parser.parse_args(argv)
    load_dotenv()
    try:
        job_id = args.job_id or json.loads(Path("fine_tune_job.json").read_bytes())["job_id"]
        client = openai.OpenAI()  # of the server that OPENAI_BASE_URL and OPENAI_API_KEY name
        job = client.fine_tuning.jobs.retrieve(job_id)
        steps = read_steps(client, job)
    except FileNotFoundError:
        sys.exit("There is no fine_tune_job.json here: name a job.")
    except openai.OpenAIError as error:
        sys.exit(f"{type(error).__name__}: python check_fine_tune_status.py says more.")
    epochs = getattr(job.hyperparameters, "n_epochs", None)
    Path(args.output).write_text(draw(f"Loss of {job.id}", steps, epochs), encoding="utf-8")
    print(f"Loss curve: {args.output}")


if __name__ == "__main__":
    main()
