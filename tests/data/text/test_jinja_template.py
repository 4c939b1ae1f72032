"""The tokenizer's own template: what is learned, where turns end, what prompts hold, and that it ends."""

import time
from itertools import groupby

import jinja2
import pytest
import transformers

from avlm.data.text import bounded_jinja
from avlm.data.text.bounded_jinja import Bounded
from avlm.data.text.chat import Chat
from avlm.data.text.tokenizer import Tokenizer
from tests.data.small_files import CONTROL, write_tokenizer
from tests.data.text.test_chat import CHATML, GENERATION, ZEPHYR, encode, turn

CONTROLS = [*CONTROL, "<|user|>", "<|assistant|>", "<|end|>", "<|return|>"]
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Qwen3 without tools: an answer to the last question gets a think block, its own or an empty one; earlier ones lose it.
QWEN3 = """\
{%- set ns = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
  {%- set content, thought = m.content, '' -%}
  {%- if m.role == 'assistant' and '</think>' in content -%}
    {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
  {%- endif -%}
  {%- if m.role == 'assistant' and loop.index0 > ns.last -%}
    {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
  {%- else -%}
    {{- '<|im_start|>' + m.role + '\\n' + content -}}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
BLOCK = "<think>\n\n</think>\n\n"
OWN = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}"
TEMPLATES = {  # name -> template, its ends, what is learned of an answer " one\n" and of a last one "two", the prompt
    "chatml": (CHATML, {"<|im_end|>"}, " one\n<|im_end|>", "two<|im_end|>", "<|im_start|>assistant\n"),
    "zephyr": (ZEPHYR, {"</s>"}, " one\n</s>", "two</s>", "<|assistant|>\n"),
    "generation": (GENERATION, {"<|im_end|>"}, " one\n<|im_end|>", "two<|im_end|>", "<|im_start|>assistant\n"),
    "qwen3": (QWEN3, {"<|im_end|>"}, " one\n<|im_end|>", "two<|im_end|>", "<|im_start|>assistant\n" + BLOCK),
    "a block in a generation block": (
        OWN + "<|assistant|>{% generation %}<think></think>{{ m.content }}<|end|>{% endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        *({"<|end|>"}, " one\n<|end|>", "two<|end|>", "<|assistant|><think></think>"),
    ),
    "trimmed, and eos after all": (  # Phi-3
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content|trim + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}",
        *({"<|end|>"}, "one<|end|>", "two<|end|>", "<|assistant|>\n"),
    ),
    "another end of the last turn": (  # gpt-oss
        OWN
        + "<|assistant|>final<s>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        *({"<|end|>", "<|return|>"}, " one\n<|end|>", "two<|return|>", "<|assistant|>final<s>"),
    ),
    "no generation prompt": (  # Mistral
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
        " {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
        *({"</s>"}, "  one\n </s>", " two </s>", " [/INST]"),
    ),
    "plain text ends a turn": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n##\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        *(set(), "  one\n\n##\n", " two\n##\n</s>", "assistant:"),
    ),
    "the next turn ends a turn": (  # GLM
        OWN
        + "<|assistant|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        *({"<|user|>"}, " one\n<|user|>", "two<|user|>", "<|assistant|>"),
    ),
    "marks do not pass": (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content + (m.content|length)|string }}<|im_end|>\n"
        "{% endfor %}" + ASKS,
        *({"<|im_end|>"}, " one\n5<|im_end|>", "two3<|im_end|>", "<|im_start|>assistant\n"),
    ),
}


def with_template(tmp_path, template, **keys) -> Chat:
    folder = write_tokenizer(tmp_path, CONTROLS, **{"eos_token": "</s>", "chat_template": template, **keys})
    return Chat(Tokenizer(folder), "tokenizer")


def spell(chat, messages, **options) -> str:
    """The text of a conversation, with what is learned in brackets."""
    groups = groupby(chat.pieces(messages, **options), key=lambda piece: piece.learned)
    texts = [(learned, "".join(piece.text for piece in group)) for learned, group in groups]
    return "".join(f"[{text}]" if learned else text for learned, text in texts)


TALK = [turn("user", "a"), turn("assistant", " one\n"), turn("user", "b "), turn("assistant", "two")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_end_where_the_template_ends_them_and_prompts_are_what_stands_before_answers(tmp_path, name):
    template, ends, first, last, asks = TEMPLATES[name]
    chat = with_template(tmp_path, template)
    assert {chat.tokenizer.decode([i]) for i in chat.stop_ids} == ends | {"</s>"}
    text, prompt = spell(chat, TALK), spell(chat, TALK[:3], prompt=True)
    assert f"[{first}]" in text and f"[{last}]" in text and prompt.endswith(asks)
    whole, asked = encode(chat, TALK)[0], encode(chat, TALK[:3], prompt=True)[0]
    assert whole[: len(asked)] == asked, "a prompt is the beginning of what is trained"
    muted = [TALK[0], TALK[1] | {"learn": False}, *TALK[2:]]
    assert f"[{first}]" not in spell(chat, muted) and f"[{last}]" in spell(chat, muted)


GLM = TEMPLATES["the next turn ends a turn"][0]
PLAIN = TEMPLATES["plain text ends a turn"][0]
BLOCKS = "<|assistant|>{% generation %}{{ m.content }}{% endgeneration %}"
NO_MARKS = "<|assistant|>{{ m.content }}{{ m.content|length }}"


@pytest.mark.parametrize(
    ("template", "text", "added"),
    [
        (GLM, "<|user|>a<|assistant|>[ one\n<|user|>]b <|assistant|>[two<|user|>]", "<|user|>"),
        (PLAIN, "user: a\n##\nassistant:[  one\n\n##\n]user: b \n##\nassistant:[ two\n##\n</s>]", "</s>"),
        (
            GLM.replace("<|assistant|>{{ m.content }}", BLOCKS + "{{ '\\n' }}"),
            "<|user|>a<|assistant|>[ one\n]\n[<|user|>]b <|assistant|>[two\n<|user|>]",
            "<|user|>",
        ),
        (
            GLM.replace("<|assistant|>{{ m.content }}", NO_MARKS),
            "<|user|>a<|assistant|>[ one\n5<|user|>]b <|assistant|>[two3<|user|>]",
            "<|user|>",
        ),
        (GLM.replace("<|user|>", ""), "a<|assistant|>[ one\n]b <|assistant|>[two</s>]", "</s>"),
        (
            GLM.replace("<|user|>", "Q: <|user|>"),
            "Q: <|user|>a<|assistant|>[ one\n]Q: <|user|>b <|assistant|>[two</s>]",
            "</s>",
        ),
    ],
)
def test_where_a_template_ends_no_turn_the_last_answer_gets_a_token_that_stops_the_model(
    tmp_path, template, text, added
):
    chat = with_template(tmp_path, template)
    assert spell(chat, TALK) == text and chat.tokenizer.id_of(added) in chat.stop_ids
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(TALK, tokenize=False) + added == text.replace("[", "").replace("]", "")
    prompt = theirs.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    assert spell(chat, TALK[:3], prompt=True) == prompt


def test_nothing_is_added_after_an_answer_that_is_not_learned_or_not_the_last(tmp_path):
    chat = with_template(tmp_path, GLM)
    muted = [*TALK[:3], TALK[3] | {"learn": False}]
    assert spell(chat, muted) == "<|user|>a<|assistant|>[ one\n<|user|>]b <|assistant|>two"
    assert spell(chat, TALK[:3]) == "<|user|>a<|assistant|>[ one\n<|user|>]b "


def test_a_template_without_any_token_that_could_stop_a_model_is_not_learned(tmp_path):
    chat = with_template(tmp_path, PLAIN, eos_token=None)
    assert spell(chat, TALK[:3], prompt=True).endswith("assistant:")
    with pytest.raises(ValueError, match=r"would never learn to stop: name an eos_token in tokenizer_config\.json"):
        chat.pieces(TALK)


def test_a_block_before_an_empty_answer_is_not_learned(tmp_path):  # GLM-4.5
    template = GLM.replace(
        "{{ m.content }}{% endif %}", "\n<think></think>{{ '\n' + m.content if m.content }}{% endif %}"
    )
    talk = [turn("user", "a"), turn("assistant", ""), turn("user", "b"), turn("assistant", "c")]
    assert spell(with_template(tmp_path, template), talk) == (
        "<|user|>a<|assistant|>\n<think></think>[<|user|>]b<|assistant|>\n<think></think>\n[c<|user|>]"
    )


def test_a_template_that_asks_for_the_date_says_what_to_do(tmp_path):  # SmolLM3, Granite 3.1
    dated = "{% if messages[0].role != 'system' %}{{ strftime_now('%d %B %Y') }}{% endif %}" + CHATML
    chat = with_template(tmp_path, dated)
    with pytest.raises(ValueError, match=r"asks for the date, .* put it into data\.system, or write the date into the"):
        chat.pieces(TALK)
    system = Chat(chat.tokenizer, "tokenizer", "today")
    assert "[two<|im_end|>]" in spell(system, TALK) and chat.tokenizer.id_of("<|im_end|>") in system.stop_ids


def test_a_date_in_a_system_prompt_that_gives_way_to_another_is_no_error(tmp_path):  # Mistral Small 3
    dated = "{% set today = strftime_now('%Y-%m-%d') %}{% set default = 'It is ' + today + '.' %}"
    dated += "{{ default if messages[0].role != 'system' }}" + CHATML
    chat = with_template(tmp_path, dated)
    with pytest.raises(ValueError, match=r"asks for the date"):
        chat.pieces(TALK)
    instead = Chat(chat.tokenizer, "tokenizer", "today")
    plain = Chat(with_template(tmp_path, CHATML).tokenizer, "tokenizer", "today")
    assert spell(instead, TALK) == spell(plain, TALK)
    for use in (
        "{{ today }}",
        "{{ today | upper }}",
        "{{ 1 if today == '' }}",
        "{{ today.split() }}",
        "{{ today[:4] }}",
    ):
        with pytest.raises(ValueError, match=r"chat_template"):
            with_template(tmp_path, "{% set today = strftime_now('%Y') %}" + use + CHATML).pieces(TALK)


def test_a_template_that_writes_the_last_turns_only_has_an_end_but_teaches_no_longer_talks(tmp_path):
    chat = with_template(tmp_path, CHATML.replace("in messages", "in messages[-2:]"))
    assert chat.tokenizer.id_of("<|im_end|>") in chat.stop_ids
    assert "[two<|im_end|>]" in spell(chat, TALK[2:])
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        chat.pieces(TALK)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "marks do not pass"])
def test_a_conversation_of_many_turns_takes_few_renderings(tmp_path, monkeypatch, name):
    chat, renderings = with_template(tmp_path, TEMPLATES[name][0]), []
    spelled = spell(chat, TALK)
    template = chat._jinja.renderer.template
    render = template.render
    monkeypatch.setattr(template, "render", lambda **names: renderings.append(1) or render(**names))
    assert spell(chat, TALK) == spelled and len(renderings) <= 7
    renderings.clear()
    assert spell(chat, TALK * 10).count("[") >= 20 and len(renderings) <= 7


def test_a_long_conversation_is_not_gone_over_in_each_of_its_turns(tmp_path):
    looks = "{% if loop.index0 == messages|length - 1 and messages is sequence and (messages|last).role is string %}"
    loop = CHATML[: CHATML.index("%}") + 2]
    chat = with_template(tmp_path, CHATML.replace(loop, loop + looks + "{% endif %}"))
    talk = [turn(("user", "assistant")[i % 2], "word " * 200) for i in range(600)]
    begun = time.process_time()
    assert sum(piece.learned for piece in chat.pieces(talk)) == 300
    assert time.process_time() - begun < 2


def test_all_renderings_of_a_conversation_share_one_budget(tmp_path, monkeypatch):
    chat = with_template(tmp_path, "{% for i in range(5000) %}{% endfor %}" + CHATML)
    assert spell(chat, TALK)
    steps = chat._jinja.renderer.environment.steps
    spell(chat, TALK)
    assert chat._jinja.renderer.environment.steps == steps > 3 * 50_000, "each conversation has its own"
    monkeypatch.setattr(bounded_jinja, "STEPS", steps - 1)
    with pytest.raises(ValueError, match="it takes more than"):
        chat.pieces(TALK)
    number = 200 // len(TALK)
    assert spell(chat, TALK * number).count("[") == 2 * number, "a long conversation may take more"


def test_published_prompts_are_those_of_transformers(tmp_path):
    chat = with_template(tmp_path, QWEN3)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True)
    assert spell(Chat(chat.tokenizer, "tokenizer", published=True), TALK[:3], prompt=True) == text
    assert spell(chat, TALK[:3], prompt=True) == text + BLOCK
    whole = theirs.apply_chat_template(TALK, tokenize=False)
    assert spell(chat, TALK).replace("[", "").replace("]", "") == whole


def test_reasoning_of_an_answers_own_is_learned_only_where_prompts_leave_room_for_it(tmp_path):
    thought = turn("assistant", "<think>\nhm\n</think>\n\ntwo")
    chat = with_template(tmp_path, QWEN3)
    with pytest.raises(ValueError, match="puts another text before this answer than before one that is asked for"):
        chat.pieces([turn("user", "a"), thought])
    earlier = spell(chat, [turn("user", "a"), thought, turn("user", "b"), turn("assistant", "three")])
    assert "assistant\n[two<|im_end|>]" in earlier and f"assistant\n{BLOCK}[three<|im_end|>]" in earlier
    assert "assistant\n[<think>\nhm\n</think>\n\ntwo<|im_end|>]" in spell(
        with_template(tmp_path / "chatml", CHATML), [turn("user", "a"), thought]
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ tools is none }}{{ documents is none }}{{ tools }}{{ x is defined }}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}{{ image_token }}",
        "{{ {'b': '<é>', 'a': [1]}|tojson }}{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}"
        "{{ 'é'|tojson(ensure_ascii=true) }}{{ [1]|tojson(indent=2) }}{{ [1]|tojson(false, 4) }}",
        "{{ 'a' ~ 1 ~ none ~ x }}{% for i in range(9) if i % 2 %}{{ loop.index }}{{ loop.last }}{% endfor %}",
        "{{ '%s-%03d' % ('a', 3) }}{{ '{:>4}|{}'.format(1, 2) }}{{ 'a,b'.split(',')|join('+') }}"
        "{{ messages[1:]|length }}",
        "{% macro m(x) %}[{{ x }}{{ caller() if caller }}]{% endmacro %}{{ m(1) }}{% call m(2) %}z{% endcall %}",
        "{% for m in messages recursive %}{{ m.role if m.role else m }}{{ loop(['x']) if m.role == 'user' }}"
        "{% endfor %}",
        "{% set roles = messages|map(attribute='role') %}{{ roles is iterable }}{{ roles|list }}",
        "{{ messages|map(attribute='role')|list }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    ],
)
def test_templates_see_and_write_what_they_do_in_transformers(tmp_path, template):
    chat = with_template(tmp_path, template, pad_token="</s>", image_token="<|eot_id|>")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert spell(chat, TALK[:1], prompt=True) == text


def test_a_token_that_a_tokenizer_has_not_is_undefined_and_adds_nothing(tmp_path):
    template = "{{ bos_token is defined }}{{ bos_token + 'a' + bos_token }}{{ strftime_now is defined }}"
    chat = with_template(tmp_path, template, bos_token=None)
    assert spell(chat, TALK[:1], prompt=True) == "FalseaFalse"


DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = "
HOSTILE = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in range(99999) %}" + "y" * 5000 + "{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}",
    "{% for i in range(99999) %}{% if 'x' in range(99999) %}{% endif %}{% endfor %}",
    "{% set s = 'a' * 30000000 %}{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}",
    "{% set s = 'a' * 30000000 %}{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "{% set x = 10 ** 8 %}{{ 10 ** x }}",
    "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ ('1' * 5000000)|int(0, 16) // 3 }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ [1] * 10 ** 9 }}",
    "{{ 'a'|center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d'|format(1000000000, 1) }}",
    "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "{{ ('\t' * 1000000).expandtabs(900000) }}",
    "{{ (5).to_bytes(1000000000, 'big') }}",
    "{{ 1|round(1000000000) }}",
    "{{ [1]|tojson(indent=1000000000) }}",
    "{{ range(9)|batch(1000000000, 'x')|list }}",
    "{{ ('x' * 100000).join(range(99999)|map('string')) }}",
    "{{ range(99999)|map('string')|join('x' * 100000) }}",
    "{{ ('a\n' * 1000000)|indent(999999) }}",
    "{{ ('ab ' * 1000000)|wordwrap(1, wrapstring='x' * 100000) }}",
    "{{ ([range(99999)] * 1000)|map('list')|list|length }}",
    "{% set l = range(99999)|list %}{% for i in range(99999) %}{% if l.count(7) %}{% endif %}{% endfor %}",
    "{% for i in range(99999) %}{% if range(99999)|select('lt', 0)|first %}{% endif %}{% endfor %}",
    "{% for i in range(99999) %}{% if range(99999)|map('string')|length %}{% endif %}{% endfor %}",
    "{{ ([[1]] * 99999)|sum(start=[])|length }}",
    "{% set l = range(99999)|list %}{% for i in range(99) %}{% set k = l|sort(reverse=true) %}{% endfor %}",
    "{{ range(99999)|list|groupby('real')|list|length }}{{ range(99999)|list|groupby('real')|list|length }}",
    "{{ ('http://a.b ' * 500000)|urlize }}",
    "{{ ('a ' * 2000000)|wordwrap(1) }}",
    DOUBLED + "[ns.x, ns.x]|first ~ ns.x %}{% endfor %}",
    DOUBLED + "ns.x ~ ns.x %}{% endfor %}",
    DOUBLED + "ns.x + ns.x %}{% endfor %}",
    DOUBLED + "ns.x|replace('a', ns.x) %}{% endfor %}",
    DOUBLED + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    DOUBLED.replace("{% set ns.x = ", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}"),
]


def test_templates_that_do_not_end_or_build_gigabytes_are_stopped(monkeypatch):
    monkeypatch.setattr(bounded_jinja, "STEPS", bounded_jinja.STEPS // 10)  # a second each otherwise
    monkeypatch.setattr(bounded_jinja, "WORK", bounded_jinja.WORK // 10)
    environment = Bounded(trim_blocks=True)
    for template in HOSTILE:
        environment.begin()
        begun = time.process_time()
        with pytest.raises((jinja2.TemplateError, RecursionError)):
            environment.from_string(template).render()
        assert time.process_time() - begun < 2, template


@pytest.mark.parametrize(
    "template",
    [
        *("{{ 1 / 0 }}", "{% break %}", "{{ 'x'.encode('nope') }}", "{{ '{a}'.format() }}", "{{ '%(a)s' % {} }}"),
        *("{{ messages|dictsort }}", "{{ " + "(" * 1000 + "1" + ")" * 1000 + " }}", "{{ 1e400|int }}", "{{ x.y.z }}"),
        *(
            "{{ '\\ud800' }}",
            "{{ cycler().next() }}",
            "{% include 'x' %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        ),
        *("{% for i in [1] %}" * 200 + "{% endfor %}" * 200, "{{ " + "1+" * 5000 + "1 }}", "{{ ''.__class__.mro() }}"),
        *("{{ 'a' * 10**9 }}", "{{ raise_exception('no\nsystems') }}", "{{ lipsum() }}"),
    ],
)
def test_whatever_a_template_raises_is_one_line(tmp_path, template):
    with pytest.raises(ValueError, match=r"chat_template|tokenizer\.json cannot encode") as error:
        chat = with_template(tmp_path, template)
        list(chat.encode(chat.pieces(TALK)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
