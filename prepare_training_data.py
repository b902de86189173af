"""Step 1: make a training file of your questions and answers, and find its faults.

A fine-tuning API takes almost any file, and fails the job later with one terse line. This step
names each fault by file and line, says what the training costs, and writes what is sound.

Needs   JSON, JSON Lines, or a table with a header (CSV, TSV). A record has one of these shapes,
        and may have a `system` message and a `history` of its own (docs/your_data.md):
            question, answer | prompt, completion | instruction, input, output (Alpaca)
            messages or conversations, of role and content or from and value (ShareGPT)
Leaves  training_data.jsonl, one {"messages": [...]} a line; what it replaces is kept as .bak.
        training_data.report.json: what was found in exactly these bytes, for step 2.
Omits   data for other methods (DPO); rows with tools or images, which go in as they are.

    python prepare_training_data.py
    python prepare_training_data.py my_faq.csv --system "You are ..." --hold-out 0.2
    python prepare_training_data.py training_data.jsonl     # once more, after you have edited it
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
    from concurrent.futures import ThreadPoolExecutor
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
DEFAULT_INPUT, DEFAULT_OUTPUT = "examples/techflow_support/qa_pairs.json", "training_data.jsonl"
DEFAULT_MODEL, OPENAI = "gpt-4.1-mini-2025-04-14", "https://api.openai.com/v1"
# USD per 1M training tokens: https://developers.openai.com/api/docs/pricing
PRICES_DATE, PRICES = "2026-07", {"gpt-4.1-2025-04-14": 25.00, "gpt-4.1-mini-2025-04-14": 5.00}
PRICES |= {"gpt-4o-2024-08-06": 25.00, "gpt-4o-mini-2024-07-18": 3.00}
MIN_EXAMPLES, ADVISED_EXAMPLES, SHORT_ANSWER = 10, 50, 50  # the last in characters
TOKEN_LIMIT = 65_536  # of one example


class Row:
    """A record on its way into the training file; line 0 stands for the file as a whole."""

    text = not_ascii = prompt = answer = last_role = ""
    is_sound, is_given, is_trained, has_tools, tokens = True, False, False, False, 0

    def __init__(self, file: str, line: int):
        self.file, self.line = file, line
        self.example: dict = {"messages": []}  # what is written of the record
        self.left_out: dict = {}  # what is not
        self.faults: list[tuple[str, str]] = []  # kind, and sentence with the cure
        self.texts: list[str] = []  # what its messages say, and by role:
        self.said: dict[str, list[str]] = {role: [] for role in ROLES}

    def fault(self, kind: str, sentence: str) -> None:
        self.faults.append((kind, sentence))
        self.is_sound = self.is_sound and kind in WARNINGS


# --- Reading: the records of a file, each with its line
# How workbooks, Parquet, chat logs, Markdown, PDF and HTML begin
NO_RECORDS = r"PK\x03|PAR1|\[?\d+[./-]\d+[./-]\d+,? |#+ |#sep|[*>-] |---|\*\*|Q:|[|<]|%PDF"


def read(path: str):
    data = Path(path).read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = data.decode(encoding, "replace").replace("\r\n", "\n").replace("\r", "\n").rstrip()
    if not text or re.match(NO_RECORDS, text.lstrip("\u200e \n")):
        sys.exit(f"{path} is empty, or no data with names: docs/your_data.md says what to do.")
    if "\ufffd" in text:
        line = text.count("\n", 0, text.index("\ufffd")) + 1
        sys.exit(f"{path}:{line}: this is no UTF-8: save it so (a table in Excel as CSV UTF-8).")
    return read_json(path, text) if text.lstrip()[0] in "[{" else read_table(path, text.strip("\n"))


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
        name = list_within(record) if end == length and not text[:start].strip() else ""
        if name:  # {"faqs": [...]}: go on inside of the list
            print(f"{path}: the records are those in `{name}`; what is beside it is left out.")
            end = next(re.finditer(r'(?<!\\)"\s*:\s*(?=\[\s*{)', text)).end()
            length = decoder.raw_decode(text, end)[1]
        else:
            yield line, record


def list_within(record) -> str:
    """Return the name of the one list of objects in an object that is no record itself."""
    if not isinstance(record, dict) or record.keys() & {"messages", "conversations"}:
        return ""
    lists = [key for key, of in record.items() if not isinstance(of, str) and "[{" in str(of)]
    return lists[0] if len(lists) == 1 else ""


def read_table(path: str, text: str):
    """Go through a table, whose header names the columns and shows the delimiter."""
    delimiter = next((sign for sign in "\t;" if sign in text.partition("\n")[0]), ",")
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the module's 128 KB
    table = csv.DictReader(io.StringIO(text), restval="", delimiter=delimiter, strict=True)
    line = 2
    try:
        for record in table:
            # Without what csv keeps under None: empty fields beyond the header.
            record = {name: of for name, of in record.items() if name is not None or any(of)}
            if any(record.values()):
                yield line, record
            line = table.line_num + 1
    except csv.Error as error:
        cure = "close the quote that opens there; a quote inside a text is written twice"
        sys.exit(f"{path}:{line}: error: invalid-csv: {error}: {cure}.")


# --- Shapes: from a record to an example
SHAPES: list = [("messages",), ("conversations",)]  # of a list of messages; and of two texts:
SHAPES += [("question", "answer"), ("prompt", "completion"), ("instruction", "output")]
ROLES = ("system", "developer", "user", "assistant")
OTHER_NAMES = {"from": "role", "value": "content", "human": "user"}
OTHER_NAMES |= {"gpt": "assistant", "ai": "assistant", "model": "assistant"}
MESSAGE_KEYS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id"}
CONTEXT = {"context", "input", "passage", "document", "documents", "background", "history"}
CONTEXT |= {"functions", "function_call of messages"}  # `tools` and `tool_calls` today


def to_example(row: Row, original, columns: dict[str, str], system: str) -> None:
    """Make row.example of a record, or tell why it stands for nothing."""
    if not isinstance(original, dict):
        return row.fault("not-an-object", 'a record is {"question": "...", "answer": "..."}')
    if None in original:  # so csv calls what a row has beyond its header
        return row.fault("invalid-csv", "a field too many: put texts with the delimiter in quotes")
    record = {}
    for name, value in original.items():
        plain = name.strip().lower()
        record[columns.get(plain, plain)] = value
    is_rated = str(record.get("label")).lower() in ("true", "false")
    if is_rated or record.keys() & {"chosen", "preferred_output"}:
        return row.fault("unknown-shape", "this is data for another method: docs/your_data.md")
    shape = next((shape for shape in SHAPES if record.keys() >= set(shape)), ())
    if not shape or len(record) < len(original):  # no names that we know, or one of them twice
        found = ", ".join(f"`{name}`" for name in original)[:80]
        cure = "--columns question=NAME,answer=NAME, or another way in docs/your_data.md"
        return row.fault("unknown-shape", f"found {found}: say which they are: {cure}")
    texts = [record.pop(name) for name in shape]  # a question and its answer; or messages alone
    if "instruction" in shape and record.get("input"):  # Alpaca: what the instruction is for
        texts[0] = f"{texts[0]}\n\n{record.pop('input')}"
    messages = turns(*texts) if len(texts) == 2 else texts[0]
    if not isinstance(messages, list) or not messages:
        return row.fault("missing-messages", "there is no list of `messages`: write one")
    if isinstance(record.get("history"), list):
        for turn in reversed(record.pop("history")):  # a question and its answer; or a message
            is_pair = isinstance(turn, list) and len(turn) == 2
            messages = (turns(*turn) if is_pair else [turn]) + messages
    own = record.pop("system", None)
    messages = [to_message(row, message) for message in messages]
    if (own or system) and messages[0].get("role") not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": own or system})
        row.is_given = not own
    row.example = {"messages": messages}
    for name, value in record.items():
        if name in {"tools", "parallel_tool_calls"} and value is not None:
            row.example[name], row.has_tools = value, True
        else:
            row.left_out[name] = value


def turns(asked, answered) -> list:
    """Return the messages of a question and its answer: texts, or lists of messages already."""
    question = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    answer = [{"role": "assistant", "content": answered}]
    return question + (answered if isinstance(answered, list) else answer)


def to_message(row: Row, raw) -> dict:
    """Return a message with the API's names for its keys and roles, and without other keys."""
    message = {}
    for key, value in raw.items() if isinstance(raw, dict) else ():
        name = OTHER_NAMES.get(key.lower(), key.lower())
        if name not in MESSAGE_KEYS:
            row.left_out[f"{key} of messages"] = value
        elif name == "role":
            message[name] = OTHER_NAMES.get(str(value).lower(), str(value).lower())
        elif value is not None:  # null counts as absent, as it does at the API
            message[name] = value
            row.has_tools |= name.startswith("tool") or isinstance(value, list)
    return message


# --- Rules: the kind of a fault, what finds it in a row, the cure; the first error is told
WARNINGS = {"last-not-assistant", "short-answer", "placeholder-answer", "html", "mojibake"}
WARNINGS |= {"not-in-training", "tutorial-prompt", "common-mark", "few-examples"}
WARNINGS |= {"not-looked-into", "duplicate", "conflicting-answer"}  # all others are errors
NO_ANSWERS = {"nan", "none", "null", "#n/a", "n/a", "tbd", "todo"}
CONTROL = r"<\|(?:(?:start|end)of\w+|fim_\w+|im_\w+)\|>"
SECRET = (  # a key of OpenAI and others, AWS, Google, GitHub, Hugging Face or Slack; a private key
    r"sk-(?<!\wsk-)(?=[\w-]*\d)[\w-]{20}|AKIA[A-Z0-9]{16}|AIza[\w-]{35}|ghp_\w{36}|"
    r"github_pat_\w{22}|hf_\w{30}|xox[abeprs]-[\w-]{10}|-----BEGIN [A-Z0-9 ]*PRIVATE KEY"
)
# Each has one of these in it. To look for them first is many times faster.
SECRET_MARKS = ["sk-", "AKIA", "AIza", "ghp_", "github_pat_", "hf_", "xox", "PRIVATE KEY"]
HTML = r"&(?:amp|[lg]t|quot|nbsp|#\d+);|</?(?:p|br|div|span|b|i|em|ul|li|a)(?: [^<>]*=[^<>]*)?/?>"
END_MARK = r"(?:\s*(?:#+|[-=]+>|END|STOP))?\s*\Z"  # of the formats of older models
MOJIBAKE, SURROGATE = r"â€.|[ÃÂ][\x80-\xbf]", r"[\ud800-\udfff]"  # "Itâ€™s", "schÃ¶n"
RULES = [
    ("no-user-message", lambda row: not row.said["user"], "there is no question: add it"),
    ("no-assistant-message", lambda row: not row.said["assistant"], "there is no answer: add it"),
    ("empty-question", lambda row: "" in row.said["user"], "a question is empty: write it"),
    ("empty-answer", lambda row: "" in row.said["assistant"], "an answer is empty: write it"),
    ("nothing-trained", lambda row: not row.is_trained, "each answer has weight 0: take one off"),
    ("control-token", lambda row: re.search(CONTROL, row.text), "the API rejects <|...|>: cut it"),
    ("secret", lambda row: has_secret(row.text), "there is a key: take it out, and revoke it"),
    ("blank-run", lambda row: re.search(r"\s{100000}", row.text), "100,000 blanks: cut them out"),
    ("lone-surrogate", lambda row: re.search(SURROGATE, row.not_ascii), "a cut-off emoji: mend it"),
    ("last-not-assistant", lambda row: row.last_role != "assistant", "the end teaches nothing"),
    ("placeholder-answer", lambda row: row.answer in NO_ANSWERS, "it stands for no answer"),
    ("short-answer", lambda row: len(row.answer) < SHORT_ANSWER, "the model will be as brief"),
    ("html", lambda row: re.search(HTML, row.text), "the model will write such marks too"),
    ("mojibake", lambda row: re.search(MOJIBAKE, row.not_ascii), "it was read in a wrong encoding"),
]


def has_secret(text: str) -> bool:
    return any(mark in text for mark in SECRET_MARKS) and bool(re.search(SECRET, text))


def judge(row: Row) -> None:
    """Tell the faults that an example has by itself."""
    if row.has_tools:
        row.prompt = json.dumps(row.example)
        row.texts = ["", row.prompt]
        return row.fault("not-looked-into", "tools, images: python -m local_api --check FILE does")
    for message in row.example["messages"]:
        text, role, weight = message.get("content"), message.get("role"), message.get("weight", 1)
        if role not in ROLES:
            return row.fault("unknown-role", "write user or assistant as the `role`")
        if not isinstance(text, str) or not isinstance(message.get("name", ""), str):
            return row.fault("invalid-content", "a message has text as `content`, or `tool_calls`")
        if repr(weight) not in ("0", "1") or ("weight" in message and role != "assistant"):
            return row.fault("invalid-weight", "`weight` is 0 or 1, and only of answers")
        row.texts.append(text)
        row.said[role].append(text.strip())
        row.is_trained |= role == "assistant" and weight == 1
        row.last_role = role
    row.text = "\n".join(row.texts)
    row.not_ascii = "" if row.text.isascii() else row.text
    row.prompt = "\n".join(row.texts[:-1]).strip().lower()  # with the system message
    row.answer = "".join(row.texts[-1:]).strip().lower()
    for kind, is_broken, cure in RULES:
        if row.is_sound and is_broken(row):
            row.fault(kind, cure)
    row.text = row.not_ascii = ""  # these were copies, which large files have no room for


def judge_file(file: Row, rows: list[Row]) -> None:
    """Tell the faults of the training file as a whole."""
    if MIN_EXAMPLES <= len(rows) < ADVISED_EXAMPLES:
        file.fault("few-examples", f"{len(rows)} examples: {ADVISED_EXAMPLES} or more are better")
    for name, at in (("prompt", -2), ("answer", -1)):
        beginnings = {re.findall(r"\A\s*", row.texts[at][:20])[0] for row in rows}
        ends = {re.findall(END_MARK, row.texts[at][-20:])[0] for row in rows}
        for marks in (beginnings, ends):
            if len(marks) == 1 and marks != {""}:
                file.fault("common-mark", f"each {name} has {marks.pop()!r}: take it out")
    lost = Counter(name for row in rows for name, value in row.left_out.items() if value)
    for name in sorted(CONTEXT & lost.keys()):
        what = f"`{name}` is not in the training data: {lost[name]:,} rows"
        file.fault("not-in-training", f"{what}; join it to the question if the answer needs it")


def tell(rows: list[Row], show_all: bool) -> None:
    """Print the faults; one that more than three rows have only once, with the count."""
    groups: dict = {}
    for row in rows:
        place = f"{row.file}:{row.line}" if row.line else row.file
        for kind, sentence in row.faults:
            groups.setdefault((row.file, kind), []).append((place, sentence))
    for (_, kind), found in groups.items():
        level, more = "warning" if kind in WARNINGS else "error", ""
        if len(found) > 3 and not show_all:
            lines = ", ".join(place.split(":")[-1] for place, _ in found[:3])
            found, more = found[:1], f" ({len(found):,} rows: lines {lines}, ...)"
        for place, sentence in found:
            print(f"{place}: {level}: {kind}: {sentence}{more}", file=sys.stderr)


class TrainingDataPreparator:
    """Makes a training file for one base model, under one system prompt."""

    def __init__(self, model: str | None = None, system: str | None = None):
        load_dotenv()
        self.model = model or os.environ.get("FINE_TUNE_MODEL") or DEFAULT_MODEL
        self.system = SYSTEM_PROMPT if system is None else system
        self.counted = "exact" if self.model in PRICES else "approximate"  # for other tokenizers
        if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):  # .env names it relative to this script
            os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(__file__).parent / folder)
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
        """Read, judge, compare and write; return what the report file holds.
        columns: {name in the data: name of a shape}; hold_out: the share for test cases."""
        rows, file = [], Row(output, 0)
        for path in inputs:
            for line, record in read(path):
                rows.append(Row(path, line))
                to_example(rows[-1], record, columns or {}, self.system)
                judge(rows[-1])
        training, tests = self.compare([row for row in rows if row.is_sound], hold_out)
        judge_file(file, training)
        given = sum(row.is_given for row in training)
        if given and "TechFlow" in self.system and "techflow" not in inputs[0]:
            file.fault("tutorial-prompt", "it makes TechFlow's assistant: give your own, --system")
        tell([*rows, file], show_all)
        if len(training) < MIN_EXAMPLES:
            few = f"{len(training)} to train on, and training takes {MIN_EXAMPLES}"
            sys.exit(f"{output}: error: too-few-examples: {few}. Nothing was written.")
        outcome = save_to_jsonl([row.example for row in training], output)
        report = self.report([*rows, file], training, given)
        print(f"{output}: {outcome}")
        if tests:
            cases = output.removesuffix(".jsonl") + "_test_cases.jsonl"
            print(f"{cases}: {save_to_jsonl([row.example for row in tests], cases)}")
            print(f"With the model: python test_model.py --cases {cases}")
        return report

    def compare(self, rows: list[Row], hold_out: float) -> tuple[list[Row], list[Row]]:
        """Tell which rows repeat or contradict others, or are too long; part off test cases."""
        training, tests, seen, prompts = [], [], {}, {}  # type: ignore[var-annotated]
        blocks = [rows[start : start + 50] for start in range(0, len(rows), 50)]
        list(ThreadPoolExecutor(os.cpu_count()).map(self.count_rows, blocks))  # on all cores
        for row in rows:
            same = seen.setdefault(tuple(row.texts), row)  # the first row with these texts
            first, number = prompts.setdefault(row.prompt, (row, len(prompts)))
            if row.tokens > TOKEN_LIMIT:
                row.fault("too-many-tokens", f"{row.tokens:,}: the end would be cut off")
            elif same is not row:
                row.fault("duplicate", f"the same as {same.file}:{same.line}: left out")
            elif int((number + 1) * hold_out) > int(number * hold_out):
                tests.append(row)  # 0.2: prompts 5, 10, ...; rows with one prompt stay together
            else:
                training.append(row)
            if same is row and first.answer != row.answer:
                row.fault("conflicting-answer", f"{first.file}:{first.line} answers it otherwise")
        return training, tests

    def report(self, rows: list[Row], training: list[Row], given: int) -> dict:
        """Print what was found, and keep it for step 2; the last of `rows` is the whole file."""
        path, server = Path(rows[-1].file), os.environ.get("OPENAI_BASE_URL") or OPENAI
        tokens, epochs = sum(row.tokens for row in training), auto_epochs(len(training))
        price, cost, words = None, None, "not known"
        if re.match(r"https?://(localhost|127\.|\[::1\])", server):
            price, cost, words = 0.0, 0.0, "free, on the local API"
        elif "api.openai.com" in server and self.model in PRICES:
            price = PRICES[self.model]
            cost = tokens * epochs * price / 1e6
            words = f"${cost:,.2f} (${price:.2f} per 1M tokens, {PRICES_DATE})"
        whose = f"yours, in {given:,} rows: {self.system[:60]}"
        if "TechFlow" in self.system:
            whose = f'TechFlow\'s, of this tutorial (--system "..." for yours), in {given:,} rows'
        kinds = [kind for row in rows for kind, _ in row.faults]
        errors = sum(kind not in WARNINGS for kind in kinds)
        warnings, bad = len(kinds) - errors, sum(not row.is_sound for row in rows)
        print(f"Records          {len(rows) - 1:,}: {len(rows) - 1 - bad:,} valid, {bad:,} invalid")
        for name, count in Counter(name for row in rows for name in row.left_out).items():
            print(f"Left out         {name or 'a column without a name'} ({count:,} rows)")
        print(f"System prompt    {whose if given else 'that of the rows, or none'}")
        print(f"Examples         {len(training):,}")
        print(f"Tokens           {tokens:,} ({self.counted})")
        print(f"  billed         {tokens * epochs:,} ({epochs} epochs, as `auto` chooses)")
        print(f"Estimated cost   {words}")
        print(f"Problems         errors {errors:,}, warnings {warnings:,}")
        firsts = [row.example["messages"][0] for row in training]
        prompts = {str(one.get("content")).strip() for one in firsts}
        is_text = all(isinstance(one.get("content"), str) for one in firsts)
        is_system = is_text and all(one.get("role") in ("system", "developer") for one in firsts)
        report: dict = {"file": str(path), "model": self.model, "server": server.rstrip("/")}
        report |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "tokens": tokens}
        report |= {"examples": len(training), "errors": errors, "warnings": warnings}
        report |= {"counted": self.counted, "epochs": epochs, "estimated_cost": cost}
        report["price_per_million_tokens"] = price
        report["system_prompt"] = prompts.pop() if is_system and len(prompts) == 1 else None
        path.with_suffix(".report.json").write_text(json.dumps(report, indent=2), "utf-8")
        return report


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


def auto_epochs(examples: int) -> int:
    """Return what `auto` chooses: openai-cookbook, examples/Chat_finetuning_data_prep.ipynb"""
    if examples * 3 < 100:
        return min(25, 100 // max(1, examples))
    return max(1, min(3, 25_000 // examples))


def validate_training_data(examples: list[dict]) -> list[tuple[str, str]]:
    """Return the (kind, cure) of each fault of examples."""
    faults = []
    for number, example in enumerate(examples, start=1):
        row = Row("examples", number)
        to_example(row, example, {}, "")
        judge(row)
        faults += row.faults
    return faults


def build_parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter  # keeps the lines of the table of shapes above
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="JSON, JSON Lines, CSV (default: TechFlow's)")
    add("-o", "--output", default=DEFAULT_OUTPUT, metavar="FILE", help="default: %(default)s")
    add("--system", metavar="TEXT", help="system prompt of the rows that have none")
    add("--columns", default="", metavar="question=NAME,answer=NAME", help="other names of yours")
    add("--model", help=f"base model (default: FINE_TUNE_MODEL, else {DEFAULT_MODEL})")
    add("--hold-out", type=float, default=0.0, metavar="F", help="share for test cases, say 0.2")
    add("--all", action="store_true", help="print each fault of each row")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_intermixed_args(argv)
    columns = {own: name for name, own in re.findall(r"(\w+) *= *([^=,]+)", args.columns.lower())}
    inputs = args.inputs or [str(Path(__file__).parent / DEFAULT_INPUT)]
    try:
        step = TrainingDataPreparator(args.model, args.system)
        step.prepare_data(inputs, args.output, columns, args.hold_out, args.all)
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}.")
    except KeyboardInterrupt:
        print("\nInterrupted: no file is half written. Run it again.", file=sys.stderr)
        sys.exit(130)
    own = "" if args.output == DEFAULT_OUTPUT else f" {args.output}"
    print(f"Next: python fine_tune.py{own}")


if __name__ == "__main__":
    main()
