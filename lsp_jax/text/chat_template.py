"""Chat templates: the one that a directory gives, and the fixed date of those that show one."""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from lsp_jax.core.errors import InputError, one_line
from lsp_jax.text.tokenizer_files import check_text

_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DATE = re.compile(r"(\d{1,2}) ([A-Z][a-z]+) (\d{4})", re.ASCII)
_RANDOM = re.compile(r"(\|\s*|map\(\s*['\"])random\b|\blipsum\s*\(")
_FOLDER = "additional_chat_templates"


def chat_template_of(directory: Path, config: dict[str, Any]) -> str | None:
    """Returns chat_template.jinja, else the (default) template in tokenizer_config.json, whose content is `config`.

    Raises InputError, naming the file, for a template that cannot be read, named templates without a default, and one
    that draws random numbers.
    """
    name, template = "tokenizer_config.json", config.get("chat_template")
    path = directory / "chat_template.jinja"
    if path.is_file():
        name = path.name
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            remedy = f"cannot be read ({one_line(error)}); restore the original file"
            raise InputError(name, str(directory), remedy) from error
    elif isinstance(template, list | dict):
        template = _default(_named(template, directory), f"{name} in {directory}")
    elif template is None and (directory / _FOLDER).is_dir():
        found = sorted(file.stem for file in (directory / _FOLDER).glob("*.jinja"))
        if found:
            _default(dict.fromkeys(found, ""), f"{_FOLDER} in {directory}", allowed=())
    if template is not None and not isinstance(template, str):
        raise InputError("chat_template", template, f"must be a text; correct {name} in {directory}")
    check_text("chat_template", template)
    if template is not None and _RANDOM.search(template):
        remedy = f"draws random numbers (`random` or `lipsum`), so prompts would differ; correct {name} in {directory}"
        raise InputError("chat_template", template, remedy)
    return template


def _named(templates: list[Any] | dict[str, Any], directory: Path) -> dict[str, Any]:
    """Templates by name: an object, or as older files have it a list of objects with `name` and `template`."""
    if isinstance(templates, dict):
        return templates
    for entry in templates:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or "template" not in entry:
            remedy = f'must be an object with "name" and "template"; correct tokenizer_config.json in {directory}'
            raise InputError("chat_template", entry, remedy)
    return {entry["name"]: entry["template"] for entry in templates}


def _default(named: dict[str, Any], where: str, allowed: tuple[str, ...] = ("default",)) -> Any:
    for name in allowed:
        if name in named:
            return named[name]
    remedy = f"{where} has these templates and none that is the default: name one of them default, or add it as "
    raise InputError("chat_template", ", ".join(map(str, named)), remedy + "chat_template.jinja")


def render(
    template: str, messages: list[dict[str, str]], add_generation_prompt: bool, tokens: dict[str, str], date: str | None
) -> str:
    """Returns the text of a conversation as transformers' `apply_chat_template(tokenize=False)` does.

    `tokens` are special tokens by role. A `date`, as `26 Jul 2024`, takes the place of today's: in `date_string` (Llama
    3.1 and later) and in `strftime_now`, whose hour is 0:00 then.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    names: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **tokens}
    if date is None or "strftime_now" not in template:
        names |= {} if date is None else {"date_string": date}
        return render_jinja_template([messages], chat_template=template, **names)[0][0]
    environment = _compile_jinja_template(template).environment  # sandboxed; takes no functions as arguments
    names |= {"messages": messages, "tools": None, "documents": None, "date_string": date}
    return environment.from_string(template, globals={"strftime_now": clock(date)}).render(**names)


# --- dates -----------------------------------------------------------------------------------------------------------


def today() -> str:
    """Returns today's date as `26 Jul 2024`, in English whatever the locale is."""
    now = time.localtime()
    return f"{now.tm_mday:02d} {_MONTHS[now.tm_mon - 1][:3]} {now.tm_year}"


def clock(date: str) -> Callable[[str], str]:
    """Returns the function `strftime_now` of chat templates for the start of the day `date`, written as
    `26 Jul 2024`. It reads neither a clock nor the locale or the time zone of the process."""

    def strftime_now(form: str) -> str:
        return _formatted(_day(date), form)

    return strftime_now


def _day(date: str) -> datetime:
    match = _DATE.fullmatch(date.strip())
    months = [month for month in _MONTHS if match and match[2] in (month, month[:3])]
    try:
        if match is None:
            raise ValueError(date)
        return datetime(int(match[3]), _MONTHS.index(months[0]) + 1, int(match[1]))
    except (ValueError, IndexError):
        remedy = "must be a date such as 26 Jul 2024: the chat template formats it with strftime_now"
        raise InputError("date", date, remedy) from None


def _formatted(moment: datetime, form: str) -> str:
    """`moment.strftime(form)` as in the C locale, in UTC."""
    month, day = _MONTHS[moment.month - 1], _DAYS[moment.weekday()]
    own = {"A": day, "a": day[:3], "B": month, "b": month[:3], "h": month[:3], "Z": "", "z": ""}
    own |= {"p": "AM" if moment.hour < 12 else "PM", "s": str(calendar.timegm(moment.timetuple())), "%": "%%"}
    own |= {"x": "%m/%d/%y", "X": "%H:%M:%S", "r": f"%I:%M:%S {own['p']}"}
    own |= {"P": own["p"].lower(), "c": f"{day[:3]} {month[:3]} %e %H:%M:%S %Y"}
    spelled = re.sub(r"%([a-zA-Z%])", lambda match: own.get(match[1], match[0]), form)
    return moment.strftime(spelled)
