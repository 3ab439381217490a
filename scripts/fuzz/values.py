"""Values at the edge of what a setting may be: as typed behind `key=`, and as written in YAML."""

from random import Random

from finetune.config import describe

NAMES = (
    *("a b", "a=b", "a,b", "[a]", "{a}", "(a)", "it's", 'a "quoted" one', "naïve", "猫", "🏴", "#1", "50 %", "a:b"),
    *("a;b", "$HOME", "${x}", "${oc.env:HOME}", "~", "-x", "--help", "a&b", "a|b", "*", "?", "a\\b", "null"),
    *("true", "1", "1e5", "a\nb", "a\tb", "x" * 200, "x.y", ".hidden", "2024_05_01", "a'b\"c", "\udcff"),
    *("a\u202eb", "e\u0301", "@x", "`x`"),
)
NUMBERS = (
    *("0", "-0", "-1", "1", "2", "0.5", "1e-320", "1e-8", "1e308", "1e309", "-1e308", "inf", "-inf", "nan", ".inf"),
    *(".nan", "1_000_000_000_000", "1000000000000000", "2147483648", "9223372036854775808", "1" * 400, "1" * 5000),
    *("0x10", "0b1", "1e20", "1.5", "07", "1,5", "٣", "-9223372036854775809", "True", "4294967297"),
)
TEXTS = (
    *("", " ", '""', "''", "null", "~", "None", "???", "${name}", "${nothing}", "${run_dir", "${oc.env:NOPE}", "$"),
    *("a", "auto", "[]", "{}", "[[]]", "[1,2]", "[null]", "{a:1}", "{a:{b:1}}", "[a,b]", "[0]", "[-1]"),
    *("[1e308,nan]", "a,b", "[", "}", '"', "x" * 300, "x" * 5000, "x" * 100_000, "\ud800", "\udcff", "a\x00b"),
    *("a\nb", "🏴‍☠️", "naïve", "../x", "/dev/null", "/dev/null/x", "/proc/nothing/x", ".", "..", "./", "~/x"),
    *("~nobody/x", "images", "base", "lm", "chats.jsonl", "run", "chat", "cache", "a/../../b", "//", "C:\\x"),
    *("file:///x", "https://x.invalid/y", "org/name", "org/name@main", "embedded:x", "-", "--x", "<b>", "%s"),
    *("{0}", "a=b", "a b", "it's", "\\", "\\n", "'a", "`", "!!python/object:os.system", "&a", "*a", "|", "> x"),
)
LISTS = (
    *("[]", "[[]]", "[null]", "[0]", "[-1]", "[1e308]", "[nan,inf]", "[a]", '[""]', '["",""]'),
    *("[9223372036854775808]", "[{a:1}]", "[1,1]", "[1,1,1,1,1]", '["\ud800"]', '["a\x00b"]', f"[{'9' * 400}]"),
    *(f'["{"x" * 5000}"]', "[0.5]", "[true]", "[peft,peft]", '["🏴‍☠️","it\'s"]', '["<script>alert(1)</script>"]'),
    *("[-9223372036854775809]", "[0.9,0.9999999999999999]", "[0,0]"),
)
TEMPLATES = (
    *("", " ", "{{", "{% for m in messages %}", "{{ messages }}", "{{ 1 / 0 }}", "{{ nothing.x.y }}", "{{ x() }}"),
    *("x", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ raise_exception('no') }}"),
    *("{{ messages[99].content }}", "{% for i in range(10**9) %}x{% endfor %}", "{% include 'x' %}"),
    *("{{ ().__class__.__bases__[0].__subclasses__() }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    *("{% for m in messages %}{{ m.role }}\ud800{{ m.content }}{% endfor %}", "{{ messages|tojson }}"),
    *("{{ strftime_now('%Q') }}"),
    *("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"),
    *("{% generation %}{% endgeneration %}"),
    *("{% for m in messages %}{{ m.content|upper }}{{ eos_token }}{% endfor %}", "{% extends 'x' %}"),
    *("{{ cycler }}",),
)
YAML = (
    *("", "null", "~", "[]", "{}", "[[]]", "{a: 1}", "[null]", "true", "off", "0", "-1", "1e308", ".inf", "-.inf"),
    *(".nan", "1e400", '""', '" "', '"\\ud800"', '"\\0"', "'it''s'", "2024-05-01", "2024_05_01", "1:30", "0x10"),
    *("0o7", "!!binary aGk=", "!!set {a}", "1" * 400, "1" * 5000, "x" * 5000, "'" + "x" * 100_000 + "'", "&a [*a]"),
    *("*a", "!x y", "'${name}'", "'${nothing}'", "'${run_dir}'", "'???'", "'🏴‍☠️'", "'../x'", "'/dev/null'"),
    *("'<b>'", "{base: base}", "[a, b]", "[0.9, .nan]", "[0, 1]", "!!python/name:os.system", "'~'", "'~/x'"),
    *("'~nobody'", "9223372036854775808", "-9223372036854775809", "1.0", "'1'", "1_000", "=", "<<", "'a\\nb'"),
    *("? a",),
)


def keys(kind: str) -> list[str]:
    """The keys that a kind of model has, and some that it has not."""
    own = {"image": "diffusion", "language": "language"}[kind]
    found = [key for key in describe.leaf_types() if describe.kind_of(key) in (None, own)]
    return [
        *found,
        *describe.sections(),
        "model.lora_targets.attention",
        "nothing",
        "trainer.checkpointing",
        "conf",
        "lora",
    ]


def typed(key: str, random: Random) -> str:
    """A value as it may stand behind `key=`: mostly of the key's type, at its edge."""
    hint = str(describe.leaf_types().get(key, ""))
    own = (
        NUMBERS if hint in ("<class 'int'>", "<class 'float'>") else LISTS if hint.startswith("list") else TEXTS + NAMES
    )
    text = random.choice(own if random.random() < 0.75 else NUMBERS + TEXTS + LISTS + NAMES)
    return f'"{text}"' if random.random() < 0.15 else text


def written(key: str, random: Random) -> str:
    """A value as it may stand in a recipe."""
    return random.choice(YAML if random.random() < 0.8 else NUMBERS + LISTS)
