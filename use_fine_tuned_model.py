"""Step 4: ask the fine-tuned model a question, or chat with it.

Needs   the server that .env names, and a model there: by default that of fine_tune_job.json.
Leaves  nothing on disk. Answers go to stdout, notes on them to stderr.
Omits   tools, images, saved conversations.

    python use_fine_tuned_model.py "How do I reset my password?"
    python use_fine_tuned_model.py                                   # a chat; Ctrl-D leaves it
    python use_fine_tuned_model.py "How do I add a user?" --compare  # asks the base model, too
    python use_fine_tuned_model.py ftjob-abc123 "Where is my invoice?"
"""

try:
    import argparse
    import json
    import os
    import sys
    from pathlib import Path

    import openai
    from dotenv import load_dotenv
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing: activate .venv, or pip install -r requirements.txt")
except KeyboardInterrupt:  # the imports take half a second
    raise SystemExit(130) from None

SAMPLING = {"temperature": 0.0, "max_tokens": 400}  # as in step 5; 0.0: always the likeliest token
ENDINGS = {  # by finish_reason, but for "stop": the answer is whole
    "length": "The answer is cut off: it is as long as max_tokens allows (see SAMPLING).",
    "content_filter": "The server's content filter stopped the answer here.",
    None: "The server did not say why the answer ended; it may be incomplete.",
}


# --- The same in the four scripts that talk to a server (a test keeps it the same) ---
def connect(**options) -> openai.OpenAI:
    """Return a client of the server that .env or the environment names."""
    load_dotenv()
    key, url = os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")
    if not key and not url:
        sys.exit("No server is named: copy .env.example to .env, or set OPENAI_API_KEY (OpenAI).")
    return openai.OpenAI(api_key=key or "-", base_url=url or "https://api.openai.com/v1", **options)


def explain(error: Exception) -> str:
    """Return one sentence: what the server answered and the cure, without the key."""
    host, key = os.environ.get("OPENAI_BASE_URL") or "OpenAI", os.environ.get("OPENAI_API_KEY", "")
    if isinstance(error, openai.APIConnectionError):
        return f"No answer from {host}. Is it running? (Local API: python -m local_api)"
    said, code = str(error), getattr(error, "status_code", "nonsense, or a file here is broken")
    if isinstance(body := getattr(error, "body", None), dict):
        said = str(body.get("message") or said)
    said = said.replace(key, "[key]") if len(key) > 8 else said  # "local" is no secret
    cures: dict = {401: "check OPENAI_API_KEY", 404: "check name and URL", 429: "see your limits"}
    return f"{host} answered {code}: {said} ({cures.get(code, 'mend that, or try again')})"


def read_job(name: str | None = None) -> dict:
    """Return the record of the job with this id or model, or of the latest job; {}: none."""
    latest, earlier = Path().glob("fine_tune_job.json"), Path().glob("fine_tune_jobs/*.json")
    for path in [*latest, *(sorted(earlier) if name else [])]:
        job = json.loads(path.read_text("utf-8"))
        if name in (None, job["job_id"], job["fine_tuned_model"], *job.get("checkpoints", [])):
            return job
    return {}


# --- End of what is the same. ---


def ask(client, model, system, question, history=(), show=True) -> str:
    """Return the answer, which comes in a stream of words: `show` prints each as it comes."""
    # The server remembers nothing: each request carries the system prompt and all turns so far.
    messages = [{"role": "system", "content": system}] if system else []
    messages += [*history, {"role": "user", "content": question}]
    chunks = client.chat.completions.create(model=model, messages=messages, stream=True, **SAMPLING)
    answer, ending = "", None
    try:
        for chunk in chunks:
            for choice in chunk.choices:  # one; none in a chunk that only brings figures
                text = choice.delta.content or choice.delta.refusal or ""  # refusal: why it won't
                answer += text
                ending = choice.finish_reason or ending
                print(text if show else "", end="", flush=True)
    finally:  # the line ends even where the connection breaks
        print(end="\n" if show else "")
    if ending != "stop":
        print(f"({ENDINGS.get(ending, f'It ended with {ending}.')})", file=sys.stderr)
    return answer


def chat(client, model, system) -> None:
    """Talk until Ctrl-D. If the server gives no answer, the chat goes on."""
    history: list[dict] = []
    while True:
        try:
            question = input("\nYou (Ctrl-D leaves): ")
            answer = ask(client, model, system, question, history)
            history.append({"role": "user", "content": question})
            history.append({"role": "assistant", "content": answer})
        except openai.APIError as error:
            print(explain(error), file=sys.stderr)
        except EOFError:  # Ctrl-D; on Windows Ctrl-Z and Enter
            return


def compare_models(prompt, system_prompt=None, model=None) -> dict[str, str]:
    """Show and return what the model answered before its training and after it."""
    fine_tuned_model, record = find_model(model)
    if not record:
        sys.exit(f"No record names the base model of {fine_tuned_model}: ask each by its name.")
    answers = {}
    for side, name in (("base", record["model"]), ("fine_tuned", fine_tuned_model)):
        print(f"--- {side}: {name}")
        answers[side] = ask(connect(), name, system_prompt or record["system_prompt"], prompt)
    return answers


def create_fine_tuned_handler(model=None, system_prompt=None):
    """Return handler(question, history=()) -> answer, for a program of your own; `history` holds
    the turns before, as {"role": "user" or "assistant", "content": str}."""
    name, record = find_model(model)
    client, system = connect(), system_prompt or record.get("system_prompt")
    return lambda question, history=(): ask(client, name, system, question, history, show=False)


def find_model(name: str | None) -> tuple[str, dict]:
    """Return (model, record of its job, or {}); name: a model, a job id, or None: the latest."""
    record = read_job(name)
    if name and not name.startswith("ftjob-"):
        return name, record
    if not name and not record:
        sys.exit("No fine_tune_job.json is here: run python fine_tune.py first, or name a model.")
    return get_model_id(name or record["job_id"]), record


def get_model_id(job_id: str) -> str:
    """Return the model that a job made; SystemExit if it has made none (yet)."""
    job = connect().fine_tuning.jobs.retrieve(job_id)
    if not job.fine_tuned_model:
        sys.exit(f"Job {job_id} is {job.status}: python check_fine_tune_status.py {job_id} --wait")
    return job.fine_tuned_model


def list_models() -> list[str]:
    """Return the names of the models that one can ask at the server."""
    return [model.id for model in connect().models.list()]


def use(args: argparse.Namespace) -> None:
    if args.list_models:
        return print(*list_models(), sep="\n")
    # A model is ft:..., a job ftjob-...; any other name needs a question of some words after it.
    words, name = args.words, None
    if (words and words[0].startswith(("ft:", "ftjob-"))) or (len(words) == 2 and " " in words[1]):
        name = words.pop(0) or None
    if len(words) > 1 or (args.compare and not words):
        sys.exit('Put the question in quotes: python use_fine_tuned_model.py "I have a question."')
    model, record = find_model(name)
    # A model answers as it was trained to when it sees the system prompt of its training data.
    system = args.system or record.get("system_prompt")
    source = "--system" if args.system else "that of the training data"
    if not system:
        source = "none recorded for this model (--system TEXT sends one)"
    origin = f" (made by {name or 'the job in fine_tune_job.json'})" if name != model else ""
    print(f"Model: {model}{origin}\nSystem prompt: {source}\n", file=sys.stderr)
    if not words:
        return chat(connect(), model, system)
    if args.compare:
        compare_models(words[0], system, name)
    else:
        ask(connect(), model, system, words[0])
    arguments = (name or "") if record else f"{model} --base-model NAME"
    print(f"\nNext: python test_model.py {arguments}".rstrip(), file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Step 4: ask the fine-tuned model, or chat.")
    parser.add_argument("words", nargs="*", metavar="WORDS", help='[MODEL] ["QUESTION"]')
    parser.add_argument("--system", metavar="TEXT", help="default: that of the training data")
    parser.add_argument("--compare", action="store_true", help="ask the base model, too")
    parser.add_argument("--list-models", action="store_true", help="name all models, and stop")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_intermixed_args(argv)
    try:
        use(args)
    except (openai.APIError, json.JSONDecodeError, AttributeError) as error:
        if isinstance(error, AttributeError) and not isinstance(error.obj, str | list | None):
            raise  # a slip in this script; only a server's nonsense gives a str, list or None
        sys.exit(explain(error))
    except KeyboardInterrupt:
        print("\nInterrupted. The model is still there: ask again.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
