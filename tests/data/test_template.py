"""Chat templates: what transformers makes of R1's (a golden file), and what a template may not do."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment

from deepseek_jax.data import template as module
from deepseek_jax.data.chat import split_thinking
from deepseek_jax.data.model_folder import read_template
from deepseek_jax.data.template import ChatTemplate, opens_thinking

R1_CONFIG = Path(__file__).parents[3] / "shared/data/deepseek_r1_tokenizer/tokenizer_config.json"
GOLDEN = json.loads((Path(__file__).parent / "golden_templates.json").read_text(encoding="utf-8"))["cases"]
# What changed in R1's template in February 2025: its generation prompt opens the thinking.
OLD_END, NEW_END = "{{'<｜Assistant｜>'}}{% endif %}", "{{'<｜Assistant｜><think>\\n'}}{% endif %}"
HI = [{"role": "user", "content": "Hi"}]
CALL = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}


def render(source: str, messages: Any = HI, **given: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **given)


@pytest.fixture(scope="module")
def r1() -> dict[str, ChatTemplate]:
    if not R1_CONFIG.is_file():
        pytest.skip("R1's chat template is not here: no shared/data/deepseek_r1_tokenizer beside the repository")
    config = json.loads(R1_CONFIG.read_text(encoding="utf-8"))
    old = config["chat_template"]
    assert old.count(OLD_END) == 1
    tokens = {name: config[name]["content"] for name in ("bos_token", "eos_token")}
    return {
        "first": ChatTemplate(old, tokens),
        "since_february": ChatTemplate(old.replace(OLD_END, NEW_END), tokens),
    }


@pytest.mark.parametrize("generation", ["first", "since_february"])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_a_conversation_is_written_as_transformers_writes_it(r1, case, generation):
    given = {"tools": case["tools"], "add_generation_prompt": case["prompt"]}
    if case["name"] == "tools, no text in the call":
        assert case[generation] is None  # see below
    elif case[generation] is None:
        with pytest.raises(ValueError, match="chat template: "):
            r1[generation].render(case["messages"], **given)
    else:
        assert r1[generation].render(case["messages"], **given) == case[generation]


def test_a_call_without_text_is_written_where_the_template_asks_for_none(r1):
    """transformers 5 leaves out `content: None` and then fails on R1's `message['content'] is none`."""
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    text = r1["first"].render(messages)
    assert "<｜User｜>Hi<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n" in text
    lists_keys = "{% for m in messages %}{{ m.keys()|list }}{% endfor %}"
    assert render(lists_keys, messages) == "['role', 'content']['role', 'tool_calls']"
    assert render(lists_keys, [{"role": "assistant", "content": None}]) == "['role']"


def test_the_newer_prompt_opens_the_thinking(r1):
    old, new = (r1[generation].render(HI) for generation in ("first", "since_february"))
    assert new == old + "<think>\n" and opens_thinking(new) and not opens_thinking(old)
    assert split_thinking("<think>" + "cut in the mid") == ("cut in the mid", "")


def test_what_templates_find():
    tools = [{"name": "f", "note": "<&>ü"}]
    assert render("{{ tools|tojson }}", tools=tools) == '[{"name": "f", "note": "<&>ü"}]'
    assert render("{{ tools|tojson(indent=1) }}", tools=[{}]) == "[\n {}\n]"
    assert render("{{ tools is none and documents is none and add_generation_prompt }}") == "True"
    assert render("{% generation %}{{ bos_token }}{% endgeneration %}{{ eos_token }}") == "<s></s>"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render("a\n  {% if x %}\n  {{ x }}\n  {% endif %}\nb", x="y") == "a\n  y\nb"
    assert render("{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }} {{ dict(b=3)['b'] }}") == "2 3"
    assert (
        render("{{ '%d of {}'|replace('%d', 'in 2024') }}, {{ 'in 2024 {}'.format(1) }}") == "in 2024 of {}, in 2024 1"
    )
    thought = [{"role": "assistant", "content": "a", "thinking": "t"}]
    assert render("{{ messages[0].reasoning_content }}", thought) == "t"
    with pytest.raises(ValueError, match="^chat template: roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


# Arguments for the methods of a text that take some.
GIVEN = {"split": "' '", "join": "['a', 'b']|map('upper')", "replace": "'a', 'b', 1", "translate": "{97: 'x'}"}
GIVEN |= dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs"), "20") | {"format_map": "{}"}
GIVEN |= dict.fromkeys(("count", "find", "index", "rfind", "rindex", "partition", "rpartition"), "'a'")
GIVEN |= dict.fromkeys(("startswith", "endswith", "removeprefix", "removesuffix"), "'a'") | {"maketrans": "'a', 'b'"}


@pytest.mark.parametrize("method", [name for name in dir(str) if not name.startswith("_")])
def test_every_method_of_a_text_renders_wherever_it_is_called(method):
    """jinja2 hands on names of its own to what is called in a loop or a block; the right text is plain jinja2's."""
    call = f"x.{method}({GIVEN.get(method, '')})"
    loop = f"{{% for x in ['banana\tsplit a'] %}}{{{{ {call} }}}}{{% endfor %}}"
    macro = f"{{% macro m(x) %}}{{{{ {call} }}}}{{% endmacro %}}{{% for i in [1] %}}{{{{ m('ab a') }}}}{{% endfor %}}"
    block = f"{{% block b %}}{{% set x = 'ab a' %}}{{{{ {call} }}}}{{% endblock %}}"
    for source in (loop, macro, block):
        assert render(source) == Environment().from_string(source).render()


def test_tools_may_have_a_template_apart():
    template = ChatTemplate("plain", {}, tool_source="with tools")
    assert (template.render(HI), template.render(HI, tools=[])) == ("plain", "with tools")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ namespace(_x=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ namespace.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ range(10**6) }}",
        "{{ 'a' * 10**8 }}",
        "{{ 10**8 * 'a' }}",
        "{{ [1] * 10**8 }}",
        "{{ 9**(9**9) }}",
        "{{ '%5000000d' % 1 }}",
        "{{ '%(a)*d' % 1 }}",
        "{{ '{:>5000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 5000000) }}",
        *(f"{{{{ 'a'{call}(10**8) }}}}" for call in (".ljust", ".zfill", ".center", ".encode().ljust")),
        "{{ '\t'.expandtabs(10**8) }}",
        "{{ ('a' * 10**4).translate({97: 'a' * 10**4}) }}",
        "{{ ('a' * 10**4).join(['b'] * 10**4) }}",
        "{{ 'a'.encode() * 10**8 }}",
        "{{ '%5000000d'.encode() % 1 }}",
        "{{ '{a:>5000000}'.format_map({'a': 1}) }}",
        "{{ 'a'|center(10**8) }}",
        "{{ 'a'|indent(10**8) }}",
        "{{ tools|tojson(indent=10**8) }}",
        "{% set n = namespace(a='ab') %}{% for i in range(40) %}{% set n.a = n.a + n.a %}{% endfor %}",
        "{% set n = namespace(a='ab') %}{% for i in range(40) %}{% set n.a = n.a|replace('a', 'aa') %}{% endfor %}",
        "{% set n = namespace(a='ab') %}{% for i in range(40) %}{% set n.a = n.a.replace('a', 'aa') %}{% endfor %}",
        "{% for i in range(99999) %}{% for i in range(99999) %}0123456789{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_what_no_template_may_do(source):
    began = time.monotonic()
    with pytest.raises(ValueError, match="^chat template: "):
        render(source)
    assert time.monotonic() - began < 60  # not a speed, but that it ends at all


def test_a_template_that_runs_on_is_stopped(monkeypatch):
    monkeypatch.setattr(module, "MAX_CPU_SECONDS", 0.2)
    with pytest.raises(ValueError, match="runs for more than 0.2 s"):
        render("{% for i in range(99999) %}{% for j in range(99999) %}{% set x = j + 1 %}{% endfor %}{% endfor %}")


def test_sources_and_inputs_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="65537 bytes, more than 65536"):
        render("x" * 65537)
    with pytest.raises(ValueError, match="line 2: .*endfor"):
        render("\n{% for x in y %}")
    with pytest.raises(ValueError, match="chat template: "):
        render("{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}")
    with pytest.raises(ValueError, match="message 1 must be a mapping"):
        render("", [*HI, {"content": "Hi"}])
    with pytest.raises(ValueError, match="non-empty list"):
        render("", [])
    with pytest.raises(ValueError, match="message 0, image: a bytes is no JSON value"):
        render("", [HI[0] | {"image": b""}])


def test_where_a_folder_keeps_its_template(tmp_path):
    def found(config: dict[str, Any]) -> str | None:
        template = read_template(tmp_path, config)
        return None if template is None else template.render(HI, tools=[])

    assert found({}) is None
    named = [{"name": "default", "template": "d{{ bos_token }}"}, {"name": "rag", "template": "r"}]
    assert found({"chat_template": named, "bos_token": {"content": "B"}}) == "dB"
    assert found({"chat_template": [*named, {"name": "tool_use", "template": "t"}]}) == "t"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert found({"chat_template": named}) == "file"
    (tmp_path / "chat_template.jinja").unlink()
    for wrong in (7, [{"name": "default"}], named[1:], {"default": "x"}, [{"name": "default", "template": 7}]):
        with pytest.raises(ValueError, match="chat.template"):
            found({"chat_template": wrong})
