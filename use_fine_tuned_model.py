"""Step 4: ask a fine-tuned model a question, or chat with it.

Needs a server (OPENAI_BASE_URL or OPENAI_API_KEY, in the environment or .env) and a fine-tuned model there. Without
MODEL it asks the model of the job in fine_tune_job.json, with the system prompt that the training data had. The answer
goes to stdout, everything else to stderr; no file is written. Left out: tools, images, saved conversations.

    python use_fine_tuned_model.py "How do I reset my password?"
    python use_fine_tuned_model.py                                   # a chat; /reset starts anew, Ctrl-D leaves
    python use_fine_tuned_model.py ftjob-abc123 "How do I add a user?" --compare
    echo "Where is my invoice?" | python use_fine_tuned_model.py --json
    python use_fine_tuned_model.py --list-models

For other code:

    from use_fine_tuned_model import create_fine_tuned_handler
    handler = create_fine_tuned_handler()                            # or a model name, or a job id
    answer = handler("How do I add a user?")

Exit codes: 0 answered, 1 the job failed, 2 usage or configuration, 3 the job is not finished, 4 the server or the
network failed or the answer was cut short, 130 interrupted.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

TEMPERATURE = 0.0  # as in test_model.py: what you read here is what the test measures
MAX_TOKENS = 400  # a support answer has some 150; a base model that rambles has to end somewhere
TIMEOUT = 120  # seconds without a byte from the server
MAX_WAIT = 300  # seconds; a server that wants us to wait for longer is not waited for

# A model's text must not steer the reader's terminal: control characters are shown as pictures (ESC as ␛), marks that
# reverse the order of the text as �.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {ord("\r"): None, 0x7F: 0x2421}
VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


# --- identical in the four scripts that talk to a server; tests/test_scripts.py holds the copies equal ---
class StepError(Exception):
    """One sentence for the reader, and the exit code that goes with it."""

    def __init__(self, sentence: str, exit_code: int = 2):
        super().__init__(sentence)
        self.exit_code = exit_code


def server_settings():
    """Return (API key, base URL) of the server that the environment or .env names (StepError if of no use)."""
    from importlib.util import find_spec

    for package, module in (("openai", "openai"), ("python-dotenv", "dotenv")):
        if not find_spec(module):
            raise StepError(
                f"{package} is not installed here: activate the virtual environment (source .venv/bin/activate) "
                "or run python -m pip install -r requirements.txt"
            )
    from dotenv import load_dotenv

    load_dotenv()
    api_key, base_url = os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")
    if not api_key and not base_url:
        raise StepError(
            "No server is configured: copy .env.example to .env to use the local API, "
            "or set OPENAI_API_KEY to use OpenAI."
        )
    # A stray line end in the key would come back in the error text of the HTTP library, key and all.
    # An empty OPENAI_BASE_URL would reach the SDK as an empty address, so the default is spelled out.
    api_key, base_url = (api_key or "").strip() or "not-needed", base_url or "https://api.openai.com/v1"
    if not (api_key.isascii() and api_key.isprintable()):
        raise StepError("OPENAI_API_KEY holds a character that no key has, such as a typographic dash: paste it again.")
    try:
        usable = urlsplit(base_url).scheme in ("http", "https") and urlsplit(base_url).hostname
    except ValueError:  # a bracket or a port that is none
        usable = False
    if not usable:
        raise StepError(
            f"OPENAI_BASE_URL is {base_url!r}, which is no address: begin it with http:// or https://, "
            "as in http://127.0.0.1:8321/v1"
        )
    return api_key, base_url


def same_server(one: str | None, other: str | None) -> bool:
    """Tell whether two base URLs name one server: localhost is 127.0.0.1, and a slash at the end is nothing."""

    def plain(base_url):
        address = urlsplit((base_url or "").rstrip("/"))
        local = address.hostname in ("localhost", "127.0.0.1", "::1")
        return address.scheme, "localhost" if local else address.hostname, address.port, address.path

    return plain(one) == plain(other)


def connect(timeout: float = 600):
    """Return the client for that server; `timeout`: seconds without an answer before a request counts as lost."""
    api_key, base_url = server_settings()
    import openai  # imported here: it takes half a second that --help should not cost

    def refuse_web_page(response):  # what a proxy or a wrong address answers; the SDK would hand it on as a bare string
        if response.is_success and "html" in response.headers.get("content-type", ""):
            raise openai.APIError("a web page", response.request, body=None)

    address = urlsplit(base_url)
    if address.scheme == "http" and address.hostname not in ("localhost", "127.0.0.1", "::1"):
        print(f"warning: plain http to {address.hostname}: your key can be read on the way.", file=sys.stderr)
    try:
        timeout = float(os.environ.get("FINE_TUNE_TIMEOUT") or timeout)
        if not 0 < timeout < 1e6:
            raise ValueError
    except ValueError:
        raise StepError("FINE_TUNE_TIMEOUT must be a number of seconds, such as 60.") from None
    http_client = openai.DefaultHttpxClient(event_hooks={"response": [refuse_web_page]})
    return openai.OpenAI(api_key=api_key, base_url=base_url, timeout=timeout, http_client=http_client)


def out_of_credit(error) -> bool:
    """Tell a 429 that waiting does not cure (credit, spending limit) from one that asks to slow down."""
    words = ("insufficient_quota", "credit", "spend", "usage_limit")
    return any(word in f"{error.type} {error.code}" for word in words)


@contextmanager
def server_errors_explained(client):
    """Turn what the SDK raises inside the block into a StepError: the cause and the cure in one sentence."""
    import openai

    server = str(client.base_url)

    def clean(text) -> str:  # one line, and no key in it even where the server repeats it
        text = " ".join(str(text).split()).rstrip(".")
        return text if len(client.api_key) < 16 else text.replace(client.api_key, "[key]")  # "local" is no secret

    try:
        yield
    except openai.APITimeoutError:
        raise StepError(f"{server} did not answer in time; run the same command again.", 4) from None
    except openai.APIConnectionError as error:
        cause = clean(error.__cause__ or error)
        if "CERTIFICATE" in cause.upper():
            cure = "its TLS certificate was not accepted; set SSL_CERT_FILE to your organisation's certificates."
        elif urlsplit(server).hostname in ("localhost", "127.0.0.1", "::1"):
            cure = f"is the local API running? Start it in another terminal: python -m local_api ({cause})"
        else:
            cure = f"check the network and OPENAI_BASE_URL ({cause})."
        raise StepError(f"Cannot reach {server}: {cure}", 4) from None
    except openai.APIStatusError as error:
        code, said = error.status_code, error.body.get("message") if isinstance(error.body, dict) else None
        otherwise = "the request was not accepted" if code < 500 else "the server failed; run the same command again"
        sentence = {
            401: "the key was not accepted; check OPENAI_API_KEY and that it belongs to this server",
            403: "this key may not do that",
            404: "no such model, job or file on this server; check the id and OPENAI_BASE_URL",
            413: "the file is larger than this server accepts; split it or shorten it",
            429: "too many requests; wait a little and run the same command again",
        }.get(code, otherwise)
        if code == 404 and not server.rstrip("/").endswith("/v1"):
            sentence += ", which ends in /v1 on most servers"
        if code == 429 and out_of_credit(error):
            sentence = "no credit is left or a spending limit is reached, and waiting does not help; see your plan"
        sentence = f"{server} answered {code}: {sentence}. It said: {clean(said or error.message)}."
        raise StepError(sentence, 4 if code == 429 or code >= 500 else 2) from None
    except (openai.APIError, json.JSONDecodeError) as error:  # an error event in a stream, a body that is not JSON
        raise StepError(f"{server} sent an answer that cannot be read: {clean(error)}.", 4) from None


def deleted(client, model: str | None) -> bool:
    """Tell whether a fine-tuned model is gone: the server lists its models, and this one is not among them."""
    import openai

    if not (model or "").startswith("ft:"):  # servers with other names list a model only once it is deployed
        return False
    try:
        names = {listed.id for listed in client.models.list()}
    except (openai.APIError, json.JSONDecodeError):
        return False  # this answers no question of the reader's, so it may stay open
    return bool(names) and model not in names


def read_job_record(path: str = "fine_tune_job.json") -> dict:
    """Return what fine_tune.py recorded of its latest job, or {} if there is no record yet."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        if not isinstance(record, dict):
            raise ValueError
        return record
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise StepError(f"{path} is not readable JSON; move it away, or name the job or model yourself.") from None


# --- end of the identical part ---


# --- the model ---


def finished_job(client, job_id: str):
    """Return the job if it has made a model; StepError says why not (exit code 1: it failed, 3: it is not finished)."""
    with server_errors_explained(client):
        job = client.fine_tuning.jobs.retrieve(job_id)
    if job.fine_tuned_model:
        return job
    if job.status in ("failed", "cancelled"):
        raise StepError(f"Job {job_id} is {job.status} and made no model: python check_fine_tune_status.py {job_id}", 1)
    raise StepError(
        f"Job {job_id} is {job.status} and has no model yet; wait for it: "
        f"python check_fine_tune_status.py {job_id} --wait",
        3,
    )


def resolve_model(client, name: str | None) -> tuple[str, Any, Any]:
    """Return (model, base model or None, system prompt or None) for a model, a job id, or None: the recorded job."""
    record = read_job_record()
    if name is None:
        if not record.get("job_id"):
            raise StepError(
                "fine_tune_job.json holds no job: run python fine_tune.py first, or name a model "
                "(python use_fine_tuned_model.py --list-models shows them)."
            )
        if not same_server(record.get("base_url"), str(client.base_url)):
            raise StepError(
                f"fine_tune_job.json belongs to {record.get('base_url')}, but the server is "
                f"{client.base_url}: set OPENAI_BASE_URL to the first, or name a model."
            )
    job_id = name or record["job_id"]
    # The prompt of one job's training data would mislead another job's model; a model named by hand is asked with it.
    system = None if job_id.startswith("ftjob-") and job_id != record.get("job_id") else record.get("system_prompt")
    if name is None or name.startswith("ftjob-"):
        job = finished_job(client, job_id)
        return job.fine_tuned_model, job.model, system
    base = name.split(":")[1] if name.startswith("ft:") else record.get("model")  # ft:BASE:owner:suffix:id
    return name, base or os.environ.get("FINE_TUNE_MODEL"), system


# --- the answer ---


def patient_client():
    """Return a client that leaves it to us to repeat a request: the SDK would wait in silence."""
    return connect(TIMEOUT).with_options(max_retries=0)


def retry_delay(error, attempt: int) -> float | None:
    """Return the seconds to wait before asking again after `error`, or None if asking again is no use."""
    status = getattr(error, "status_code", None)
    if attempt >= (8 if status == 429 else 2) or type(getattr(error, "__cause__", None)).__name__ == "ConnectError":
        return None  # asked often enough, or nobody listens at that address
    if status is not None:
        if (status not in (408, 409, 429) and status < 500) or (status == 429 and out_of_credit(error)):
            return None
        stated = error.response.headers.get("retry-after", "")
        if stated.replace(".", "", 1).isdigit():
            return float(stated) if float(stated) <= MAX_WAIT else None
    return min(0.5 * 2**attempt, 20)


def explain_deleted_model(client, error, model: str) -> None:
    """StepError with the cure if `error` is a 404 because the fine-tuned model is not (or no longer) on the server."""
    if getattr(error, "status_code", None) == 404 and deleted(client, model):
        raise StepError(
            f"{client.base_url} answered 404: it has no model {model} (any more); make it again with "
            "python fine_tune.py --force, or name another "
            "(python use_fine_tuned_model.py --list-models shows them)."
        )


def build_messages(system: str | None, history: list[dict] | None, question: str) -> list[dict]:
    """Return the messages of one request, in the order of the training data."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *(history or []), {"role": "user", "content": question}]


def ask(
    client,
    model: str,
    messages: list[dict],
    show: Callable[[str], object] = lambda text: None,
    temperature: float = TEMPERATURE,
    max_tokens: int = MAX_TOKENS,
) -> dict:
    """Return {"model", "answer", "finish_reason", "usage", "latency_seconds"}; `show` gets the text piece by piece.

    StepError if the answer is cut short: the SDK raises nothing when a stream just ends, so the finish reason decides.
    What has been shown cannot be taken back, so only an answer of which nothing has come is asked for again.
    """
    import openai

    attempt = 0
    with server_errors_explained(client):
        while True:
            answer, finish_reason, usage, error = "", None, None, None
            start = time.perf_counter()
            try:
                for chunk in client.chat.completions.create(
                    model=model,
                    messages=messages,
                    temperature=temperature,
                    max_tokens=max_tokens,
                    stream=True,
                    stream_options={"include_usage": True},
                ):
                    usage = chunk.usage or usage
                    for choice in (chunk.choices or [])[:1]:  # the last chunk, that of the usage, has none
                        text = choice.delta.content or ""
                        show(text)
                        answer += text
                        finish_reason = choice.finish_reason or finish_reason
            except (openai.APIError, json.JSONDecodeError) as raised:
                error = raised
            if finish_reason:
                return {
                    "model": model,
                    "answer": answer,
                    "finish_reason": finish_reason,
                    "usage": usage and usage.model_dump(exclude_none=True),
                    "latency_seconds": round(time.perf_counter() - start, 3),
                }
            delay = None if answer else retry_delay(error, attempt)
            if delay is None:
                if error and not answer:
                    explain_deleted_model(client, error, model)
                    raise error
                raise StepError(f"The answer was cut short ({error or 'no finish reason came'}): ask again.", 4)
            reason = "The server limits the rate" if getattr(error, "status_code", 0) == 429 else "No answer came"
            print(f"{reason}; asking again in {delay:g} s.", file=sys.stderr)
            time.sleep(delay)
            attempt += 1


def print_answer(client, model: str, messages: list[dict], **parameters) -> dict:
    """Print the answer as it comes, and return what ask() returns. A pipe gets exactly what the model wrote."""
    on_terminal, shown = sys.stdout.isatty(), []

    def show(text: str) -> None:
        shown.append(text)
        print(text.translate(VISIBLE) if on_terminal else text, end="", flush=True)

    try:
        answer = ask(client, model, messages, show, **parameters)
    finally:
        if any(shown):
            print()
    if answer["finish_reason"] != "stop" or not answer["answer"]:
        why = {
            "length": "--max-tokens are used up",
            "content_filter": "the server's filter stopped it",
            "stop": "the answer is empty",
        }
        print(f"(It ends here: {why.get(answer['finish_reason'], answer['finish_reason'])}.)", file=sys.stderr)
    return answer


def chat(client, model: str, system: str | None, **parameters) -> None:
    """Talk until Ctrl-D; each request carries the conversation so far. An answer that fails does not end the chat."""
    with suppress(ImportError):  # arrow keys in input(); Windows has them anyway
        import readline  # noqa: F401
    print("/reset forgets the conversation, Ctrl-D leaves.", file=sys.stderr)
    history: list[dict] = []
    with suppress(EOFError):
        while True:
            question = input("\nYou: ").strip()
            if question == "/reset":
                history = []
            elif question:
                print("Assistant: ", end="", flush=True)
                try:
                    answer = print_answer(client, model, build_messages(system, history, question), **parameters)
                except StepError as error:
                    print(error, file=sys.stderr)
                    continue
                history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer["answer"]}]


# --- for other code ---


def create_fine_tuned_handler(model: str | None = None, system_prompt: str | None = None) -> Callable[..., str]:
    """Return handler(question, history=None) -> str, a drop-in for any function that answers a question.

    `model` is a model name, a job id, or None for the job in fine_tune_job.json; `history` is a list of messages
    {"role": "user" or "assistant", "content": str}. Without `system_prompt` that of the training data is used.
    StepError is raised where the command line would print a sentence.
    """
    client = patient_client()
    fine_tuned_model, _, recorded = resolve_model(client, model)
    system = recorded if system_prompt is None else system_prompt

    def handler(question: str, history: list[dict] | None = None) -> str:
        return ask(client, fine_tuned_model, build_messages(system, history, question))["answer"]

    return handler


def get_model_id(job_id: str) -> str:
    """Return the name of the model that a fine-tuning job made, such as "ft:gpt-4.1-mini-2025-04-14:acme::B1x2"."""
    return finished_job(patient_client(), job_id).fine_tuned_model


def list_models() -> list[dict]:
    """Return the models you can ask, fine-tuned ones first: dicts of id, owned_by and shutdown_date (str or None)."""
    client = patient_client()
    with server_errors_explained(client):
        models = [
            {"id": model.id, "owned_by": model.owned_by, "shutdown_date": getattr(model, "shutdown_date", None)}
            for model in client.models.list()
        ]
    return sorted(models, key=lambda model: (not model["id"].startswith("ft:"), model["id"]))


def compare_models(prompt: str, system_prompt: str | None = None, model: str | None = None) -> dict:
    """Return {"base": ..., "fine_tuned": ...}: what each of the two models says to `prompt`, as ask() returns it."""
    client = patient_client()
    fine_tuned_model, base_model, recorded = resolve_model(client, model)
    messages = build_messages(recorded if system_prompt is None else system_prompt, None, prompt)
    return {"base": ask(client, base_model, messages), "fine_tuned": ask(client, fine_tuned_model, messages)}


# --- the command line ---


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Step 4: ask a fine-tuned model a question, or chat with it.",
        epilog="One argument alone is the MODEL if it starts with ft: or ftjob- or is a name that the server lists, "
        "else the QUESTION.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="model name or job id (default: the job in fine_tune_job.json)")
    add(
        "question",
        nargs="?",
        metavar="QUESTION",
        help="without it, or with -, it is read from a pipe; on a terminal, a chat begins",
    )
    add("--system", metavar="TEXT", help="system prompt (default: that of the training data)")
    add("--temperature", type=float, default=TEMPERATURE, metavar="T", help="default: %(default)s")
    add("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help="longest answer (default: %(default)s)")
    add("--compare", action="store_true", help="ask the base model, too")
    add("--list-models", action="store_true", help="show the models you can ask, and stop")
    add("--json", action="store_true", help="print one JSON document: answer, usage, latency, ...")
    return parser


def tell_apart(args) -> tuple[str | None, str | None]:
    """Return (model, question) as the command line gives them; None: the recorded model, no question yet."""
    model, question = args.model, args.question
    if (
        model
        and not question
        and not model.startswith(("ft:", "ftjob-"))
        and (" " in model or model == "-" or model not in [listed["id"] for listed in list_models()])
    ):
        return None, model
    return model, question


def read_question(question: str | None, args) -> str | None:
    """Return the question, from a pipe if need be; None: a chat."""
    if question == "-" or (question is None and not sys.stdin.isatty()):
        question = sys.stdin.read().strip()
    if not question and (question is not None or args.compare or args.json):
        raise StepError("There is no question: give one as an argument or through a pipe.")
    return question


def print_models(as_json: bool) -> None:
    models = list_models()
    if as_json:
        return print(json.dumps(models, indent=2))
    width = max((len(model["id"]) for model in models), default=0)
    for model in models:
        line = f"{model['id']:{width}}  {'shuts down ' + model['shutdown_date'] if model['shutdown_date'] else ''}"
        print(line.rstrip().translate(VISIBLE))


def run(args) -> None:
    if args.list_models:
        return print_models(args.json)
    name, question = tell_apart(args)
    client = patient_client()
    model, base_model, recorded = resolve_model(client, name)
    question = read_question(question, args)  # after the model: that a job is missing comes before the question
    if args.compare and not base_model:
        raise StepError(f"The base model of {model} is not known: set FINE_TUNE_MODEL to its name.")
    system = recorded if args.system is None else args.system
    source = "--system" if args.system else "that of the training data" if system else "none"
    origin = "" if name == model else f" (made by {name or 'the job in fine_tune_job.json'})"
    print(f"Model: {model}{origin}\nSystem prompt: {source}\n", file=sys.stderr)

    parameters = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    if question is None:
        return chat(client, model, system, **parameters)
    messages = build_messages(system, None, question)
    asked = {"base": base_model, "fine_tuned": model} if args.compare else {"fine_tuned": model}
    if args.json:
        answers = {role: ask(client, asked[role], messages, **parameters) for role in asked}
        return print(json.dumps(answers if args.compare else answers["fine_tuned"], indent=2))
    for role in asked:
        if args.compare:
            print(f"--- {role.replace('_', '-')}: {asked[role]}")
        print_answer(client, asked[role], messages, **parameters)
    tested = f" {name}" if name and model != base_model else ""  # step 5 compares no model with itself
    print(f"\nNext: python test_model.py{tested}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    # A terminal may deliver bytes that are not UTF-8; the API takes none.
    args = build_parser().parse_args([word.encode("utf-8", "replace").decode() for word in words])
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? and does not end the run
    try:
        run(args)
        return 0
    except StepError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  or the interpreter complains at its end
        return 0


if __name__ == "__main__":
    sys.exit(main())
