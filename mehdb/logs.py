"""The log of a node: one record, one line, as text or as JSON, whatever the values in it are.

    log.warning('leader not followed code=%s reason="%s"', error.code, error)

What is a field, the template says: a name, `=`, and `%s` or `%d`, in quotes where spaces are to be expected. Values are
filled in afterwards and never read again: none can end a line, or look like a field, or like a record of its own.
"""

import json
import logging
import re
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, NamedTuple

log = logging.getLogger("mehdb")

DIRECTIVE: Final = re.compile(r'(?: ?\b(?P<name>[a-z_]+)=)?(?P<quote>"?)%[sd](?P=quote)')
# What ends a line somewhere or steers a terminal, the marks that turn the direction of text, and halves of characters,
# which cannot be written.
UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
NEEDS_QUOTES: Final = re.compile(r'[\s"=\\]|^$')
SHORT: Final = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
INDENT: Final = "    "  # of a traceback's lines in text: what begins at the margin is a record


class Event(NamedTuple):
    """What a record says: an event, which is the same each time but for words in it, and its fields, in order."""

    message: str
    fields: dict[str, object]


def event(record: logging.LogRecord) -> Event:
    """Return what *record* says. Only those of mehdb have fields: others' templates follow no rule."""
    arguments = record.args
    template = str(record.msg)
    directives = list(DIRECTIVE.finditer(template))
    ours = record.name.partition(".")[0] == log.name and isinstance(arguments, tuple)
    if not ours or not (template.count("%") == len(directives) == len(arguments or ())):
        return Event(record.getMessage(), {})
    assert isinstance(arguments, tuple)  # noqa: S101  looked at above
    words, fields, end = [], {}, 0
    for directive, value in zip(directives, arguments, strict=True):
        words.append(template[end : directive.start()])
        end = directive.end()
        if directive["name"]:
            fields[directive["name"]] = value
        else:
            words.append(str(value))
    return Event("".join([*words, template[end:]]), fields)


def escaped(text: str) -> str:
    r"""Return *text* without what could end a line or do worse: as `\n`, `\x1b` or `\u2028`."""
    return UNSAFE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    return SHORT.get(character) or (f"\\x{code:02x}" if code < 1 << 8 else f"\\u{code:04x}")


def _quoted(value: object) -> str:
    """Return *value* as it stands behind a name: in quotes where it could be taken for more than one."""
    text = str(value)
    if not NEEDS_QUOTES.search(text) and not UNSAFE.search(text):
        return text
    return '"' + escaped(text.replace("\\", r"\\").replace('"', r"\"")) + '"'


class TextFormatter(logging.Formatter):
    """`time=… level=… logger=… event name=value …`: values in quotes where they need them. A traceback is indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Return *record* as a line; with a traceback as several, of which only the first begins at the margin."""
        message, fields = event(record)
        text = " ".join([escaped(message), *(f"{name}={_quoted(value)}" for name, value in fields.items())])
        line = f"time={_time(record)} level={record.levelname} logger={escaped(record.name)} {text}"
        traced = [INDENT + escaped(one) for one in _traceback(record).split("\n") if one]
        return "\n".join([line, *traced])


class JsonFormatter(logging.Formatter):
    """An object with `time`, `level`, `logger`, `message`, the fields, and `traceback` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return *record* as one line of ASCII."""
        message, fields = event(record)
        known: dict[str, object] = {
            "time": _time(record), "level": record.levelname, "logger": record.name, "message": message,
        }  # fmt: skip
        told = {name: value if isinstance(value, int | float) else str(value) for name, value in fields.items()}
        traced = _traceback(record)
        return json.dumps(known | told | known | ({"traceback": traced} if traced else {}))


FORMATTERS: Final[dict[str, type[logging.Formatter]]] = {"text": TextFormatter, "json": JsonFormatter}


def set_up(level: str, form: str) -> None:
    """Have the log go to standard error from *level* on, in *form*, and with it all that would go there by itself."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATTERS[form]())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each request, we log changes of state
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    sys.unraisablehook = lambda what: _log_uncaught(what.exc_type, what.exc_value, what.exc_traceback)
    threading.excepthook = lambda what: _log_uncaught(what.exc_type, what.exc_value, what.exc_traceback)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None:
        log.critical("uncaught kind=%s", kind.__name__, exc_info=(kind, error, trace))


def _time(record: logging.LogRecord) -> str:
    """Return when *record* was made: RFC 3339, UTC, milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(record: logging.LogRecord) -> str:
    """Return the traceback and the stack of *record*, if it has any."""
    parts = [logging.Formatter().formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
    return "\n".join([*parts, record.stack_info] if record.stack_info else parts)
