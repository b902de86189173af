"""Step 1: make a training file of your questions and answers, and find its faults.

Needs   JSON, JSON Lines, or a table with a header (CSV, TSV). A record has one of these shapes,
        and may have a `system` message and a `history` of its own (docs/your_data.md):
            question, answer | prompt, completion | instruction, input, output (Alpaca)
            messages or conversations, of role and content or from and value (ShareGPT)
Leaves  training_data.jsonl, one {"messages": [...]} a line; what it replaces is kept as .bak.
        training_data.report.json: the figures of exactly these bytes, for step 2.
Omits   data for other methods (DPO); a look into tools and images; dirt: extras/find_dirt.py.

    python prepare_training_data.py
    python prepare_training_data.py my_faq.csv --system "You are ..." --hold-out 0.2
"""

try:
    import argparse
    import csv
    import hashlib
    import io
    import json
    import os
    import re
    import sys
    from collections import Counter
    from concurrent.futures import ThreadPoolExecutor as Threads
    from pathlib import Path

    import tiktoken
    from dotenv import load_dotenv
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing: activate .venv, or pip install -r requirements.txt")
except KeyboardInterrupt:  # the imports take a while
    raise SystemExit(130) from None

# The model learns to answer under this message, and has to be asked under the same one.
SYSTEM_PROMPT = (
    "You are the support assistant of TechFlow, a project and workflow tool for teams. You help "
    "customers with their account, billing, features and bugs. Be friendly, accurate and brief."
)
TECHFLOW = "support assistant of TechFlow"  # by this the tutorial's own prompt is known
DEFAULT_INPUT, DEFAULT_OUTPUT = "examples/techflow_support/qa_pairs.json", "training_data.jsonl"
MIN_EXAMPLES, ADVISED_EXAMPLES, TOKEN_LIMIT = 10, 50, 65_536  # tokens of one example


class Row:
    """A record on its way into the training file; one with line 0 is the training file itself."""

    answer = system = ""  # filled by to_example() and judge()
    is_sound, has_more, prompt, tokens = True, False, 0, 0  # more: than texts; prompt: its hash

    def __init__(self, file: str, line: int):
        self.file, self.line = file, line
        self.example: dict = {"messages": []}  # what is written of the record
        self.left_out: dict = {}  # what is not
        self.texts: list[str] = []  # of its messages
        self.faults: list[tuple[str, str, str]] = []  # level, kind, sentence with the cure

    def fault(self, kind: str, sentence: str) -> None:
        self.faults.append(("error", kind, sentence))
        self.is_sound = False

    def warn(self, kind: str, sentence: str) -> None:
        self.faults.append(("warning", kind, sentence))


# --- Reading: the records of a file, each with its line
# An empty file, and how workbooks, Parquet, chat logs, Markdown, Anki, YAML, HTML and PDF begin
NO_RECORDS = r"\s*\Z|PK\x03|PAR1|\[?\d+[./-]\d+[./-]\d+,? |#+ |#sep|[*>-] |---|\*\*|Q:|[|<]|%PDF"


def read(path: str):
    data = Path(path).read_bytes()
    code = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = data.decode(code, "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
    if re.match(NO_RECORDS, text.lstrip("\u200e \n")):
        sys.exit(f"{path} is empty, or no data with names: docs/your_data.md says what to do.")
    if undecoded := re.search(r"[\udc80-\udcff]", text):
        line = text.count("\n", 0, undecoded.start()) + 1
        sys.exit(f"{path}:{line}: this is no UTF-8: save it so (a table in Excel as CSV UTF-8).")
    return read_json(path, text) if text.lstrip()[0] in "[{" else read_table(path, text.rstrip())


def read_json(path: str, text: str):
    """Read one value after another, and skip the commas and brackets between: a list, or lines."""
    decoder, next_record = json.JSONDecoder(), re.compile(r"[^\s,\[\]]")
    line, counted, end, length = 1, 0, 0, len(text)
    while found := next_record.search(text, end, length):
        start = found.start()
        line, counted = line + text.count("\n", counted, start), start
        try:
            record, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            sys.exit(f"{path}:{line}: error: invalid-json: {error}: mend it there, and run again.")
        lists = []  # {"faqs": [...]}: go on behind the name of the one list of objects
        if type(record) is dict and start == text.find("{") and not next_record.search(text, end):
            lists = [key for key, of in record.items() if "[{" in str(of) and type(of) is not str]
        if len(lists) == 1 and str(record[lists[0]])[:2] == "[{" and (lists[0],) not in SHAPES:
            print(f"{path}: the records are those in `{lists[0]}`; what is beside it is left out.")
            end = next(re.finditer(r'(?<!\\)"\s*:\s*(?=\[\s*{)', text)).end()
            length = decoder.raw_decode(text, end)[1]
        else:
            yield line, record


def read_table(path: str, text: str):
    """Go through a table, whose header names the columns and shows the delimiter."""
    text = text.lstrip("\n")
    delimiter = next((sign for sign in "\t;" if sign in text.partition("\n")[0]), ",")
    form: dict = {"delimiter": delimiter, "skipinitialspace": True, "strict": True}
    table, line = csv.DictReader(io.StringIO(text), restval="", **form), 2
    try:
        for record in table:
            if any(record.values()):
                yield line, record
            line = table.line_num + 1
    except csv.Error as error:
        sys.exit(f"{path}:{line}: error: invalid-csv: {error}: close the quote, or double it.")


# --- Shapes: from a record to an example
SHAPES: list = [("messages",), ("conversations",)]  # one list of messages; or two texts:
SHAPES += [("question", "answer"), ("prompt", "completion"), ("instruction", "output")]
ROLES = {"system": "", "developer": "", "user": "empty-question", "assistant": "empty-answer"}
OTHER_NAMES = {"from": "role", "value": "content", "human": "user"}
OTHER_NAMES |= {"gpt": "assistant", "ai": "assistant", "model": "assistant"}
MORE_KEYS = {"name", "weight", "tool_calls", "tool_call_id"}  # of messages, beside their texts
CONTEXT = "context input passage document documents background history functions"


def to_example(row: Row, original, columns: dict[str, str], system: str) -> None:
    """Make row.example of a record and judge it, or tell why it stands for nothing."""
    if not isinstance(original, dict):
        return row.fault("not-an-object", 'a record is {"question": "...", "answer": "..."}')
    if any(original.pop(None, [])):  # so csv calls what a row has beyond its header
        return row.fault("invalid-csv", "a field too many: quote a text that holds the delimiter")
    record = {}
    for name, value in original.items():
        plain = name.strip().lower()
        record[columns.get(plain, plain)] = value
    is_rated = "completion" in record and str(record.get("label")).lower() in ("true", "false")
    if is_rated or record.keys() & {"chosen", "preferred_output"}:
        return row.fault("unknown-shape", "this is data for another method: docs/your_data.md")
    shape = next((shape for shape in SHAPES if record.keys() >= set(shape)), ())
    if not shape or len(record) < len(original):  # no names that we know, or one of them twice
        found = ", ".join(f"`{name}`" for name in original)[:80]
        cure = "--columns question=NAME,answer=NAME, each once, or see docs/your_data.md"
        return row.fault("unknown-shape", f"found {found}: say which they are: {cure}")
    texts = [record.pop(name) for name in shape]  # a question and its answer; or messages alone
    if "instruction" in shape and record.get("input"):  # Alpaca: what the instruction is for
        texts[0] = "\n\n".join(str(text) for text in (texts[0], record.pop("input")) if text)
    messages = turns(*texts) if len(texts) == 2 else texts[0]
    if not isinstance(messages, list) or not messages:
        return row.fault("missing-messages", "there is no list of `messages`: write one")
    if isinstance(record.get("history"), list):
        for one in reversed(record.pop("history")):  # a question and its answer; or a message
            messages = (turns(*one) if type(one) is list and len(one) == 2 else [one]) + messages
    messages = [to_message(row, message) for message in messages]
    if messages[0].get("role") not in ("system", "developer"):
        own = record.pop("system", None) or system
        row.system, messages = str(own), [{"role": "system", "content": own}] * bool(own) + messages
    else:
        row.system = str(messages[0].get("content")).strip()
    row.example = {"messages": messages}
    for name, value in record.items():
        if name in {"tools", "parallel_tool_calls"} and value is not None:
            row.example[name], row.has_more = value, True
        else:
            row.left_out[name] = value
    judge(row)


def turns(asked, said) -> list:
    """Return the messages of a question and its answer: texts, or lists of messages already."""
    question = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    answer = said if isinstance(said, list) else [{"role": "assistant", "content": said}]
    return question + answer


def to_message(row: Row, raw) -> dict:
    """Return a message with the API's names for its keys and roles, and without other keys."""
    message = {}
    for key, value in raw.items() if isinstance(raw, dict) else ():
        name = OTHER_NAMES.get(key.lower(), key.lower())
        if name == "role":
            message[name] = OTHER_NAMES.get(str(value).lower(), str(value).lower())
        elif name != "content" and name not in MORE_KEYS:
            row.left_out[f"{key} of messages"] = value
        elif value is not None:  # null counts as absent, as it does at the API
            message[name] = value
            row.has_more |= name in MORE_KEYS or isinstance(value, list)
    return message


# --- Rules: what no text may hold, patterns that find it, the cure
SECRETS = [r"sk-(?<!\wsk-)[\w-]{0,40}[^\W_]{20}", r"AKIA[A-Z\d]{16}", "PRIVATE KEY-"]
SECRETS += [r"ghp_[^\W_]{22}", r"_pat_[^\W_]{22}", r"hf_[^\W_]{22}"]  # fixed text first: faster
FORBIDDEN = [
    ("control-token", [r"<\|((start|end)of|fim_|im_)\w+\|>"], "the API rejects <|...|>: cut it"),
    ("secret", SECRETS, "there is a key: cut and revoke it"),
    ("blank-run", [r"\s{100000}"], "100,000 blanks: cut them out"),
]


def judge(row: Row) -> None:
    """Find the first fault that an example has by itself; fill in texts, prompt and answer."""
    for message in row.example["messages"]:
        role, text = message.get("role"), message.get("content")
        if row.has_more:  # calls, pictures, weights: too much for this page
            continue
        if role not in ROLES:
            return row.fault("unknown-role", "write user or assistant as the `role`")
        if not isinstance(text, str):
            return row.fault("invalid-content", "a message has text as `content`, or `tool_calls`")
        if ROLES[role] and not text.strip():
            return row.fault(ROLES[role], f"a message of the {role} is empty: write it")
        row.texts.append(text)
    roles = {message.get("role") for message in row.example["messages"]}
    for role in ("user", "assistant"):
        if role not in roles:
            return row.fault(f"no-{role}-message", f"no message is the {role}'s: add one")
    if row.has_more:
        row.warn("not-looked-into", "it is no text alone: python -m local_api --check FILE")
        row.texts = [json.dumps(row.example, ensure_ascii=False), ""]  # all of it is the prompt
    text = re.sub(r"\\[nt]|;base64,[\w+/=-]*", "\n", "\n".join(row.texts))  # of JSON, pictures
    for kind, patterns, cure in FORBIDDEN:
        if any(re.search(pattern, text) for pattern in patterns):
            return row.fault(kind, cure)
    if not text.isascii() and re.search(r"[\ud800-\udfff]", text):
        return row.fault("lone-surrogate", "there is half an emoji: mend it")
    row.prompt = hash("\n".join(row.texts[:-1]).strip().lower())  # with the system message
    row.answer = row.texts[-1].strip().lower()


def judge_file(whole: Row, rows: list[Row]) -> None:
    """Tell the faults of the training file as a whole."""
    if MIN_EXAMPLES <= len(rows) < ADVISED_EXAMPLES:
        whole.warn("few-examples", f"{len(rows)} examples: {ADVISED_EXAMPLES} or more are better")
    is_techflow = any("techflow" in row.answer for row in rows)
    if not is_techflow and any(TECHFLOW in row.system for row in rows):
        whole.warn("tutorial-prompt", "the system prompt is TechFlow's: give yours, --system")
    lost = Counter(name for row in rows for name, value in row.left_out.items() if value)
    for name in sorted(lost.keys() & CONTEXT.split()):
        what = f"`{name}` is not in the training data: {lost[name]:,} rows"
        whole.warn("not-in-training", f"{what}; put it into the question, `functions` into `tools`")


def tell(rows: list[Row], show_all: bool) -> None:
    """Print the faults; one that more than three rows share is printed once, with a count."""
    groups: dict = {}
    for row in rows:
        for level, kind, sentence in row.faults:
            groups.setdefault((row.file, level, kind), []).append((row.line, sentence))
    for (file, level, kind), found in groups.items():
        more = ""
        if len(found) > 3 and found[0][0] and not show_all:
            lines = ", ".join(str(line) for line, _ in found[:3])
            found, more = found[:1], f" ({len(found):,} rows: lines {lines}, ...)"
        for line, sentence in found:
            place = f"{file}:{line}" if line else file
            print(f"{place}: {level}: {kind}: {sentence}{more}", file=sys.stderr)


class TrainingDataPreparator:
    """Makes a training file; rows without a system prompt get this one. Counts tokens."""

    def __init__(self, system: str | None = None):
        load_dotenv()
        self.system = SYSTEM_PROMPT if system is None else system
        self.counted = "exact" if "gpt" in os.getenv("FINE_TUNE_MODEL", "gpt") else "approximate"
        try:
            self.encoding: tiktoken.Encoding | None = tiktoken.get_encoding("o200k_base")
        except (OSError, ValueError):  # the vocabulary is not here and cannot be downloaded
            self.encoding, self.counted = None, "estimated"

    def format_qa_pair(self, question: str, answer: str) -> dict:
        return {"messages": [{"role": "system", "content": self.system}, *turns(question, answer)]}

    def validate_example(self, example: dict) -> list[tuple[str, str]]:
        return validate_training_data([example])

    def count_tokens(self, texts: list[str]) -> list[int]:
        if self.encoding is None:
            return [len(text.encode()) // 4 for text in texts]
        return [len(self.encoding.encode_ordinary(text)) for text in texts]

    def count_rows(self, rows: list[Row]) -> None:
        for row in rows:  # by openai-cookbook's rule for chats
            row.tokens = 3 + sum(4 + count for count in self.count_tokens(row.texts))

    def prepare_data(self, inputs, output, columns=None, hold_out=0.0, show_all=False) -> dict:
        """Read, judge, compare, tell and write; return what the report file holds.
        columns: {name in the data: name in SHAPES}; hold_out: the share for test cases."""
        rows, whole = [], Row(output, 0)
        for path in inputs:
            for line, record in read(path):
                rows.append(Row(path, line))
                to_example(rows[-1], record, columns or {}, self.system)
        training, tests = self.compare([row for row in rows if row.is_sound], hold_out)
        judge_file(whole, training)
        tell([*rows, whole], show_all)
        if len(training) < MIN_EXAMPLES:
            few = f"{len(training)} to train on, and training takes {MIN_EXAMPLES}"
            sys.exit(f"{output}: error: too-few-examples: {few}. Nothing was written.")
        valid = sum(row.is_sound for row in rows)  # True counts as 1
        print(f"Records          {len(rows):,}: {valid:,} valid, {len(rows) - valid:,} invalid")
        for name, count in Counter(name for row in rows for name in row.left_out).items():
            print(f"Left out         {name or 'a column without a name'} ({count:,} rows)")
        systems = Counter(row.system for row in training)
        for system, count in systems.most_common(3):
            tutorials = 'TechFlow\'s, of this tutorial (--system "..." for yours)'
            whose = tutorials if TECHFLOW in system else " ".join(system[:60].split()) or "none"
            print(f"System prompt    {whose} ({count:,} rows)")
        tokens = sum(row.tokens for row in training)
        print(f"Examples         {len(training):,}, of {tokens:,} tokens ({self.counted})")
        print(f"{output}: {save_to_jsonl([row.example for row in training], output)}")
        report: dict = {"sha256": hashlib.sha256(Path(output).read_bytes()).hexdigest()}
        report |= {"examples": len(training), "tokens": tokens, "counted": self.counted}
        report["system_prompt"] = system if len(systems) == 1 else ""
        Path(output).with_suffix(".report.json").write_text(json.dumps(report, indent=2), "utf-8")
        if tests:
            cases = output.removesuffix(".jsonl") + "_test_cases.jsonl"
            print(f"{cases}: {save_to_jsonl([row.example for row in tests], cases)}, {len(tests)}")
            print(f"After the training: python test_model.py --cases {cases}")
        return report

    def compare(self, rows: list[Row], hold_out: float) -> tuple[list[Row], list[Row]]:
        """Count tokens, tell which rows repeat or contradict others, and part off test cases."""
        training, tests, seen, prompts = [], [], {}, {}  # type: ignore[var-annotated]
        blocks = [rows[n : n + 200] for n in range(0, len(rows), 200)]
        list(Threads(os.cpu_count()).map(self.count_rows, blocks))  # tiktoken lets threads go on
        for row in rows:
            same = seen.setdefault(tuple(row.texts), row)  # the first row with these texts
            first, number = prompts.setdefault(row.prompt, (row, len(prompts)))
            if row.tokens > TOKEN_LIMIT:
                row.fault("too-many-tokens", f"{row.tokens:,}: shorten it, else its end is cut off")
            elif same is not row:
                row.warn("duplicate", f"the same as {same.file}:{same.line}: left out")
            elif int((number + 1) * hold_out) > int(number * hold_out):
                tests.append(row)  # 0.2: prompts 5, 10, ...; rows with one prompt stay together
            else:
                training.append(row)
            if same is row and first.answer != row.answer:
                row.warn("conflicting-answer", f"{first.file}:{first.line} answers it otherwise")
        return training, tests


def save_to_jsonl(examples: list[dict], path: str) -> str:
    """Write a file whole or not at all; return what became of it and of the one before it."""
    data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in examples)
    old = Path(path).read_bytes() if Path(path).exists() else b""
    if old == data:
        return "already up to date"
    if old:
        Path(f"{path}.bak").write_bytes(old)
    Path(f"{path}.tmp").write_bytes(data)
    os.replace(f"{path}.tmp", path)
    return f"written; what stood there is kept as {path}.bak" if old else "written"


def validate_training_data(examples: list[dict]) -> list[tuple[str, str]]:
    """Return the (kind, cure) of each fault of examples."""
    faults = []
    for number, example in enumerate(examples, start=1):
        row = Row("examples", number)
        to_example(row, example, {}, "")
        faults += [(kind, cure) for _, kind, cure in row.faults]
    return faults


def build_parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter  # keeps the lines of the table of shapes above
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="JSON, JSON Lines, CSV (default: TechFlow's)")
    add("-o", "--output", default=DEFAULT_OUTPUT, metavar="FILE", help="default: %(default)s")
    add("--system", metavar="TEXT", help="system prompt of the rows that have none")
    add("--columns", default="", metavar="question=NAME,answer=NAME", help="other names of yours")
    add("--hold-out", type=float, default=0.0, metavar="F", help="share for test cases, say 0.2")
    add("--all", action="store_true", help="print a fault for every row that has it")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_intermixed_args(argv)
    columns = {own: name for name, own in re.findall(r"(\w+) *= *([^=,]+)", args.columns.lower())}
    inputs = args.inputs or [str(Path(__file__).parent / DEFAULT_INPUT)]
    try:
        step = TrainingDataPreparator(args.system)
        step.prepare_data(inputs, args.output, columns, args.hold_out, args.all)
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}.")
    except KeyboardInterrupt:
        print("\nInterrupted: no file is half written. Run it again.", file=sys.stderr)
        sys.exit(130)
    print(f"Next: python fine_tune.py {args.output}")


if __name__ == "__main__":
    main()
