"""Step 4: ask a fine-tuned model a question, or chat with it.

Needs a server (OPENAI_BASE_URL or OPENAI_API_KEY, in the environment or .env) and a fine-tuned model there. Without
MODEL it asks the model of the job in fine_tune_job.json, with the system prompt that the training data had. The answer
goes to stdout, everything else to stderr; no file is written. Left out: tools, images, saved conversations.

    python use_fine_tuned_model.py "How do I reset my password?"
    python use_fine_tuned_model.py                                   # a chat; /reset starts anew, Ctrl-D leaves
    python use_fine_tuned_model.py ftjob-abc123 "How do I add a user?" --compare
    echo "Where is my invoice?" | python use_fine_tuned_model.py --json

Other code asks with answer = create_fine_tuned_handler()(question). Exit codes: 0 answered, 1 the job failed, 2 usage
or configuration, 3 the job is not finished, 4 server or network failed or the answer was cut short, 130 interrupted.
"""

from __future__ import annotations  # so that an older Python gets as far as a sentence

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Any, TextIO
from urllib.parse import urlsplit

TIMEOUT = 120  # seconds without a byte from the server
MAX_WAIT = 300  # seconds; a server that wants us to wait for longer is not waited for
# As in test_model.py: what you read here is what the test measures.
PARAMETERS = {"temperature": 0.0, "max_tokens": 400}
# A model's text must not steer the reader's terminal: control characters, and marks that reverse the order of the text.
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


# --- identical in the four scripts that talk to a server; tests/test_scripts.py holds the copies equal ---
class StepError(Exception):
    """One sentence for the reader, and the exit code that goes with it."""

    def __init__(self, sentence: str, exit_code: int = 2):
        super().__init__(sentence)
        self.exit_code = exit_code


def server_settings() -> tuple[str, str]:
    """Return the API key and the base URL of the server that the environment or .env names."""
    from dotenv import load_dotenv

    load_dotenv()
    # A line end pasted with a key would come back in an error text of the HTTP library, key and all.
    api_key, base_url = (os.environ.get(name, "").strip() for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"))
    if not api_key and not base_url:
        raise StepError(
            "No server is configured: copy .env.example to .env to use the local API, "
            "or set OPENAI_API_KEY to use OpenAI."
        )
    if not (api_key.isascii() and api_key.isprintable()):
        raise StepError("OPENAI_API_KEY holds a character that no key has, such as a typographic dash: paste it again.")
    if base_url and not re.fullmatch(
        r"https?://(\[[0-9a-f:]+\]|[\w-]{1,63}(\.[\w-]{1,63})*\.?)(:\d{1,5})?(/\S*)?", base_url
    ):
        # Its value is not repeated: it may be the key, set in the wrong variable, or hold a password.
        raise StepError("OPENAI_BASE_URL is no address such as http://127.0.0.1:8321/v1.")
    return api_key or "not-needed", base_url.rstrip("/") or "https://api.openai.com/v1"


def same_server(one: str | None, other: str | None) -> bool:
    one, other = ((url or "").rstrip("/").replace("//localhost", "//127.0.0.1") for url in (one, other))
    return one == other


def connect(timeout: float = 600):
    """Return the SDK's client for that server; after `timeout` seconds without an answer a request counts as lost."""
    import openai  # imported here: it takes half a second that --help should not cost

    def refuse_what_is_no_answer(response):  # the SDK would hand on a bare string, a list or None
        content_type = response.headers.get("content-type", "") if response.is_success else ""
        fault = "a web page" if "html" in content_type else None  # from a proxy or a wrong address
        if "json" in content_type and not response.url.path.endswith("/content"):
            response.read()
            try:
                fault = None if isinstance(response.json(), dict) else "no JSON object"
            except ValueError as error:
                fault = str(error)
        if fault:
            raise openai.APIError(fault, response.request, body=None)

    api_key, base_url = server_settings()
    if base_url.startswith("http:") and not is_local(base_url):
        print(f"warning: plain http to {base_url}: your key can be read on the way.", file=sys.stderr)
    timeout = float(os.environ.get("FINE_TUNE_TIMEOUT", timeout))
    try:
        http_client = openai.DefaultHttpxClient(event_hooks={"response": [refuse_what_is_no_answer]})
        return openai.OpenAI(api_key=api_key, base_url=base_url, timeout=timeout, http_client=http_client)
    except Exception as error:  # of many classes, with texts that may hold a proxy's password
        fault = f"a value that cannot be used ({type(error).__name__})"
        raise StepError(f"OPENAI_BASE_URL, SSL_CERT_FILE or one of the *_PROXY variables has {fault}.") from None


def is_local(base_url: str) -> bool:
    return urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1")


def out_of_credit(error) -> bool:
    """Tell a 429 that waiting does not cure (credit, spending limit) from one that asks to slow down."""
    return bool(re.search("insufficient_quota|credit|spend|usage_limit", f"{error.type} {error.code}"))


def clean(text) -> str:
    """Return the text in one line, with no key in it even where the server repeats it."""
    text, key = " ".join(str(text).split()), os.environ.get("OPENAI_API_KEY", "").strip()
    return text if len(key) < 16 else text.replace(key, "[key]")  # "local" is no secret


@contextmanager
def server_errors_explained(client):
    """Turn what the SDK raises inside the block into a StepError: the cause and the cure in one sentence."""
    import openai

    server = str(client.base_url).rstrip("/")

    try:
        yield
    except openai.APITimeoutError:
        raise StepError(f"{server} did not answer in time; run the same command again.", 4) from None
    except openai.APIConnectionError as error:
        cause = clean(error.__cause__ or error).rstrip(".")
        cure = "check the network and OPENAI_BASE_URL"
        if "CERTIFICATE" in cause.upper():
            cure = "its TLS certificate was not accepted; set SSL_CERT_FILE to your organisation's certificates"
        elif is_local(server):
            cure = "is the local API running? Start it in another terminal: python -m local_api"
        raise StepError(f"Cannot reach {server}: {cure} ({cause}).", 4) from None
    except openai.APIStatusError as error:
        code, said = error.status_code, error.body.get("message") if isinstance(error.body, dict) else None
        sentence = {
            401: "the key was not accepted; check OPENAI_API_KEY and that it belongs to this server",
            403: "this key may not do that",
            404: "no such model, job or file on this server; check the id and OPENAI_BASE_URL, which often ends in /v1",
            413: "the file is larger than this server accepts; split it or shorten it",
            429: "too many requests; wait a little and run the same command again",
        }.get(code, "the request was not accepted" if code < 500 else "the server failed; run the same command again")
        if code == 429 and out_of_credit(error):
            sentence = "no credit is left or a spending limit is reached, and waiting does not help; see your plan"
        exit_code = 4 if code == 429 or code >= 500 else 2
        raise StepError(
            f"{server} answered {code}: {sentence}. It said: {clean(said or error.message).rstrip('.')}.", exit_code
        ) from None
    except (openai.APIError, json.JSONDecodeError) as error:  # an error event in a stream, a body that is not JSON
        raise StepError(f"{server} sent an answer that cannot be read: {clean(error).rstrip('.')}.", 4) from None


def read_job_record(path: str = "fine_tune_job.json") -> dict:
    """Return what fine_tune.py recorded of its latest job, or {} if there is no record yet."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        raise StepError(f"{path} is not readable JSON; move it away, or name the job or model yourself.") from None


# --- end of the identical part ---


def get_model_id(job_id: str) -> str:
    """Return the name of the model that a job made; StepError with exit code 1 if it failed, 3 if it still runs."""
    client = connect()
    with server_errors_explained(client):
        job = client.fine_tuning.jobs.retrieve(job_id)
    if job.fine_tuned_model:
        return job.fine_tuned_model
    exit_code = 1 if job.status in ("failed", "cancelled") else 3
    raise StepError(f"Job {job_id} is {job.status}: python check_fine_tune_status.py {job_id} --wait", exit_code)


def resolve_model(name: str | None) -> tuple[str, str | None, str | None]:
    """Return (model, base model, system prompt) of a model, of a job id, or of None: the job in fine_tune_job.json."""
    server, record = server_settings()[1], read_job_record()
    if not name and not record.get("job_id"):
        raise StepError("fine_tune_job.json holds no job: run python fine_tune.py first, or name a model.")
    if not name and not same_server(record.get("base_url"), server):
        raise StepError(f"fine_tune_job.json is for {record.get('base_url')}: set OPENAI_BASE_URL, or name a model.")
    name = name or record["job_id"]
    if name.startswith("ftjob-") and name != record.get("job_id"):
        record = {}  # the system prompt of one job's training data would mislead another job's model
    model = get_model_id(name) if name.startswith("ftjob-") else name
    base_model = model.split(":")[1] if model.startswith("ft:") else record.get("model")  # ft:BASE:owner:suffix:id
    return model, base_model or os.environ.get("FINE_TUNE_MODEL"), record.get("system_prompt")


def list_models() -> list[dict]:
    """Return the models you can ask, fine-tuned ones first: dicts of id, owned_by and shutdown_date (str or None)."""
    client = connect()
    with server_errors_explained(client):
        models = sorted(client.models.list(), key=lambda model: (not model.id.startswith("ft:"), model.id))
    keys = ("id", "owned_by", "shutdown_date")  # the last one is not in the SDK's type
    return [{key: getattr(model, key, None) for key in keys} for model in models]


def retry_delay(error, attempt: int) -> float | None:
    """Return the seconds to wait before asking again after `error`, or None if asking again is no use."""
    status = getattr(error, "status_code", 500)  # without one: no answer came, or none that can be read
    passing = status in (408, 409, 429) or status >= 500
    if not passing or attempt >= (8 if status == 429 else 2) or (status == 429 and out_of_credit(error)):
        return None
    stated = error.response.headers.get("retry-after", "") if hasattr(error, "response") else ""
    delay = float(stated) if re.fullmatch(r"\d+(\.\d+)?", stated) else min(0.5 * 2**attempt, 20)
    return delay if delay <= MAX_WAIT else None


def ask(client, model, system, question, history=(), out: TextIO | None = None, **parameters) -> dict:
    """Return {"model", "answer", "finish_reason", "usage", "latency_seconds"}; `out` gets the answer as it comes.

    StepError if the answer is cut short: the SDK raises nothing when a stream just ends, so the finish reason decides.
    What has been shown cannot be taken back, so only an answer of which nothing has come is asked for again.
    """
    import openai  # imported here: it takes half a second that --help should not cost

    client = client.with_options(max_retries=0)  # the SDK would wait in silence
    messages = [{"role": "system", "content": system}] if system else []
    messages += [*history, {"role": "user", "content": question}]
    request = {"model": model, "messages": messages, **PARAMETERS, **parameters, "stream": True}
    for attempt in itertools.count():
        result: dict[str, Any] = {"model": model, "answer": "", "finish_reason": None, "usage": None}
        error, start = None, time.perf_counter()
        try:
            for chunk in client.chat.completions.create(**request, stream_options={"include_usage": True}):
                if chunk.usage:
                    result["usage"] = chunk.usage.model_dump(exclude_none=True)
                for choice in getattr(chunk, "choices", None) or ():  # none in the last chunk, that of the usage
                    text = getattr(choice.delta, "content", None) or ""
                    result["answer"] += text
                    result["finish_reason"] = choice.finish_reason or result["finish_reason"]
                    if out:
                        print(CONTROLS.sub("�", text) if out.isatty() else text, end="", file=out, flush=True)
        except (openai.APIError, json.JSONDecodeError) as raised:
            error = raised
        except (AttributeError, TypeError, UnicodeDecodeError):  # JSON of another shape, or no text at all
            error = openai.APIError("it is no chat completion", request=None, body=None)  # type: ignore[arg-type]
        if out and result["answer"]:
            print(file=out)
        if result["finish_reason"]:
            if out and result["finish_reason"] != "stop":
                print(f"(It ends here: {result['finish_reason']}; see --max-tokens.)", file=sys.stderr)
            return {**result, "latency_seconds": round(time.perf_counter() - start, 3)}
        delay = None if result["answer"] else retry_delay(error, attempt)
        if delay is None:
            cut = StepError("The answer was cut short: ask again.", 4)
            if error and result["answer"]:
                print(cut, file=sys.stderr)  # and the error says why
            with server_errors_explained(client):
                raise error or cut
        reason = "The server limits the rate" if getattr(error, "status_code", 0) == 429 else "No answer came"
        print(f"{reason}; asking again in {delay:g} s.", file=sys.stderr)
        time.sleep(delay)
    raise AssertionError


def create_fine_tuned_handler(model: str | None = None, system_prompt: str | None = None) -> Callable[..., str]:
    """Return handler(question, history=None) -> str, a drop-in for any function that answers a question.

    `model` is a model name, a job id, or None for the job in fine_tune_job.json; `history` is a list of messages
    {"role": "user" or "assistant", "content": str}. Without `system_prompt` that of the training data is used.
    """
    client, (name, _, recorded) = connect(TIMEOUT), resolve_model(model)
    system = recorded if system_prompt is None else system_prompt
    return lambda question, history=None: ask(client, name, system, question, history or ())["answer"]


def compare_models(prompt, system_prompt=None, model=None, out: TextIO | None = None, **parameters) -> dict:
    """Return {"base": ..., "fine_tuned": ...}: what each of the two models says to `prompt`, as ask() returns it."""
    client, (fine_tuned_model, base_model, recorded) = connect(TIMEOUT), resolve_model(model)
    if not base_model:
        raise StepError(f"The base model of {fine_tuned_model} is not known: set FINE_TUNE_MODEL to its name.")
    answers, system = {}, recorded if system_prompt is None else system_prompt
    for role, name in (("base", base_model), ("fine_tuned", fine_tuned_model)):
        if out:
            print(f"--- {role}: {name}", file=out)
        answers[role] = ask(client, name, system, prompt, out=out, **parameters)
    return answers


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
                try:
                    answer = ask(client, model, system, question, history, sys.stdout, **parameters)["answer"]
                    history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                except StepError as error:
                    print(error, file=sys.stderr)


def temperature(text: str) -> float:
    if not 0 <= float(text) <= 2:  # not-a-number is no part of JSON
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2")
    return float(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Step 4: ask a fine-tuned model a question, or chat with it.",
        epilog="One argument alone is the MODEL if it is ft:..., ftjob-... or a listed model, else the QUESTION.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="model name or job id (default: the job in fine_tune_job.json)")
    add("question", nargs="?", metavar="QUESTION", help="without it, or with -, a pipe's text; on a terminal, a chat")
    add("--system", metavar="TEXT", help="system prompt (default: that of the training data)")
    add("--temperature", type=temperature, default=PARAMETERS["temperature"], metavar="T", help="default: %(default)s")
    add("--max-tokens", type=int, default=PARAMETERS["max_tokens"], metavar="N", help="default: %(default)s")
    add("--compare", action="store_true", help="ask the base model, too")
    add("--list-models", action="store_true", help="show the models you can ask, and stop")
    add("--json", action="store_true", help="print one JSON document: answer, usage, latency, ...")
    return parser


def run(args) -> None:
    if args.list_models:
        models = list_models()
        dates = [f"shuts down {model['shutdown_date']}" if model["shutdown_date"] else "" for model in models]
        lines = [f"{model['id']:40}  {date}".rstrip() for model, date in zip(models, dates, strict=True)]
        return print(json.dumps(models, indent=2) if args.json else "\n".join(lines))
    name, question = args.model, args.question
    if name and question is None and not name.startswith(("ft:", "ftjob-")):
        listed = " " not in name and name in [model["id"] for model in list_models()]
        name, question = (name, None) if listed else (None, name)
    model, base_model, recorded = resolve_model(name)
    if question == "-" or (question is None and not sys.stdin.isatty()):
        question = sys.stdin.read().strip()
    if not question and (question is not None or args.compare or args.json):
        raise StepError("There is no question: give one as an argument or through a pipe.")
    system = recorded if args.system is None else args.system
    source = "--system" if args.system else "that of the training data" if system else "none"
    origin = "" if name == model else f" (made by {name or 'the job in fine_tune_job.json'})"
    print(f"Model: {model}{origin}\nSystem prompt: {source}\n", file=sys.stderr)

    client, out = connect(TIMEOUT), None if args.json else sys.stdout
    parameters = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    if question is None:
        chat(client, model, system, **parameters)
    elif args.compare:
        answer = compare_models(question, system or "", model, out, **parameters)
    else:
        answer = ask(client, model, system, question, out=out, **parameters)
    if args.json:
        print(json.dumps(answer, indent=2))
    elif question:
        tested = f" {name}" if name and model != base_model else ""  # step 5 compares no model with itself
        print(f"\nNext: python test_model.py{tested}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    # A terminal may deliver bytes that are not UTF-8; the API takes none.
    words = [word.encode("utf-8", "replace").decode() for word in (sys.argv[1:] if argv is None else argv)]
    args = build_parser().parse_intermixed_args(words)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? and does not end the run
    try:
        run(args)
        return 0
    except StepError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        cure = "activate the virtual environment (Python 3.10 or newer), or python -m pip install -r requirements.txt"
        print(f"{error.name} is missing here: {cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  or the interpreter complains at its end
        return 0


if __name__ == "__main__":
    sys.exit(main())
