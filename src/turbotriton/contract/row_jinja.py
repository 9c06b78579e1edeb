"""A row of the chat template table as Jinja, so that a workspace carries it where a checkpoint has no template of its own."""

from .chat_templates import TemplateRow

__all__ = ["row_jinja"]

_SOURCE = """\
{%- set ns = namespace(text=BEGIN, rounds=0) -%}
{%- if messages[0]['role'] != 'system' -%}{%- set ns.text = ns.text + OPENING -%}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.text = ns.text + SYSTEM + message['content'] + EOSYS -%}
{%- elif message['role'] == 'user' -%}
{%- set ns.rounds = ns.rounds + 1 -%}
{%- set ns.text = ns.text + ROUND + USER + message['content'] + EOH -%}
{%- elif message['role'] == 'assistant' -%}
{%- set ns.text = ns.text + ASSISTANT + message['content'] + EOA -%}
{%- else -%}
{{- raise_exception('this template knows system, user and assistant') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{%- set ns.text = (ns.text + ASSISTANT)CUT -%}{%- endif -%}
{{- ns.text -}}"""


def row_jinja(row: TemplateRow, *, adds_bos: bool) -> str:
    """Renders as the row does. `adds_bos`: the tokenizer puts BOS before a text, so the template begins with it, once."""
    begin = _literal(row.begin)
    if adds_bos:
        begin = f"(bos_token if not {begin}.startswith(bos_token) else '') + {begin}"
    opening = row.without_system if row.meta_instruction is None else row.system + row.meta_instruction + row.eosys
    parts = {
        "BEGIN": begin,
        "OPENING": _literal(opening),
        "EOSYS": _literal(row.eosys),
        "SYSTEM": _literal(row.system),
        "ROUND": "'[Round ' + ns.rounds | string + ']\\n\\n'" if row.rounds else "''",
        "USER": _literal(row.user),
        "EOH": _literal(row.eoh),
        "ASSISTANT": _literal(row.assistant),
        "EOA": _literal(row.eoa + row.separator),
        "CUT": "[:-1]" if row.cut_end else "",
    }
    pieces = _SOURCE
    for name in parts:
        pieces = pieces.replace(name, f"\0{name}\0")  # marked first: a marker may spell another one's name
    return "".join(parts.get(piece, piece) for piece in pieces.split("\0"))


def _literal(text: str) -> str:
    """A Jinja string."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
