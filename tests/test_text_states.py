"""Hidden states of text encoders, edits of embeddings, and the tokens that stand for each other."""

import pytest
import torch
from conftest import CPU, make_xl
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTokenizer

from ldm.diffusion.edits import edit_embeddings
from ldm.diffusion.load import load_model
from ldm.diffusion.text_states import LAST_STATE, capture_states, text_encoder_layers
from ldm.diffusion.tokenizer import align_tokens, last_token, vocabulary_words
from ldm.io.paths import REPO_ROOT

PROMPTS = ["", "a painting by VanGogh", "a photo of a church"]
PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] a an art ##ist artist by car scarf go ##gh in of painting style s the van , '"


@pytest.fixture(scope="module")
def xl_path(tmp_path_factory):
    return make_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def clip():
    return CLIPTokenizer.from_pretrained(REPO_ROOT / "models" / "mini-sd" / "tokenizer")


@pytest.fixture(scope="module")
def bert():
    tokenizer = BertTokenizer(vocab={piece: number for number, piece in enumerate(PIECES.split())})
    tokenizer.model_max_length = 14
    return tokenizer


@pytest.fixture(params=["clip", "bert"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def num_hooks(encoder: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in encoder.modules())


class Recorder:
    """An edit that adds one to the prompts whose state is asked for, and keeps what it was given."""

    def __init__(self, layers):
        self.layers = layers

    def __call__(self, prompt_embeds, states):
        self.states = states
        return prompt_embeds + 1


def test_states_are_those_of_every_layer_and_what_the_denoiser_is_given(tiny):
    encoder = tiny.text_encoder
    plain = tiny.encode_prompt(PROMPTS)
    embeds, states = tiny.encode_with_states(PROMPTS, {"text_encoder": [0, LAST_STATE]})
    assert torch.equal(embeds, plain) and set(states) == {("text_encoder", 0), ("text_encoder", LAST_STATE)}
    assert torch.equal(states["text_encoder", LAST_STATE], plain)
    normalised = encoder.get_submodule(next(n for n, _ in encoder.named_modules() if n.endswith("final_layer_norm")))
    assert torch.allclose(normalised(states["text_encoder", 0]), plain, atol=1e-6)
    assert tiny.encode_with_states(PROMPTS, {})[1] == {}


def test_states_of_xl_are_by_encoder_and_its_pooled_row_is_no_state(xl_path):
    model = load_model(xl_path, CPU)
    layers = {"text_encoder": [0, LAST_STATE], "text_encoder_2": [0, 1, LAST_STATE]}
    embeds, states = model.encode_with_states(PROMPTS, layers)
    assert torch.equal(embeds, model.encode_prompt(PROMPTS)) and embeds.shape == (3, 17, 96 + 32)
    assert {key: tuple(state.shape) for key, state in states.items()} == {
        ("text_encoder", 0): (3, 16, 40),
        ("text_encoder", LAST_STATE): (3, 16, 40),
        ("text_encoder_2", 0): (3, 16, 56),
        ("text_encoder_2", 1): (3, 16, 56),
        ("text_encoder_2", LAST_STATE): (3, 16, 56),
    }
    last = torch.cat([states[name, LAST_STATE] for name in model.text_encoders], dim=-1)
    assert torch.equal(last, model.split(embeds).tokens)
    assert torch.equal(states["text_encoder_2", 0], states["text_encoder_2", LAST_STATE])  # the last but one, of two


def test_no_hooks_are_left_behind(tiny):
    encoder = tiny.text_encoder
    before = num_hooks(encoder)
    with pytest.raises(RuntimeError), capture_states(encoder, [0]) as states:
        assert num_hooks(encoder) == before + 1
        tiny.encode_prompt([""])
        assert set(states) == {0} and states[0].shape[-1] == 96
        raise RuntimeError
    assert num_hooks(encoder) == before
    tiny.encode_with_states([""], {"text_encoder": [0, LAST_STATE]})
    assert num_hooks(encoder) == before


def test_layers_of_a_bert_are_found_and_those_of_something_else_are_not():
    config = BertConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, vocab_size=30, pad_token_id=0
    )
    encoder = BertModel(config).eval()
    assert len(text_encoder_layers(encoder)) == 3
    with capture_states(encoder, [0, 2]) as states:
        output = encoder(torch.tensor([[2, 5, 3]]))[0]
    assert set(states) == {0, 2} and torch.equal(states[2], output)
    other = nn.Linear(2, 2)
    object.__setattr__(other, "config", config)  # as encoders of transformers have one
    with pytest.raises(ValueError, match="Linear has no list of 3 layers"):
        text_encoder_layers(other)


def test_an_edit_is_given_the_states_that_it_asks_for_and_holds_within_its_block(tiny):
    plain, recorder = tiny.encode_prompt(PROMPTS), Recorder({"text_encoder": [0]})
    with edit_embeddings(tiny, recorder):
        assert torch.equal(tiny.encode_prompt(PROMPTS), plain + 1)
        assert set(recorder.states) == {("text_encoder", 0)}
        assert torch.equal(tiny.encode_uncond(), plain[:1] + 1)
        assert torch.equal(tiny.encode_with_states(PROMPTS, {})[0], plain)
    assert tiny.embedding_edit is None and torch.equal(tiny.encode_prompt(PROMPTS), plain)


def test_what_was_before_is_back_on_every_way_out(tiny):
    outer, inner = Recorder({}), Recorder({})
    with edit_embeddings(tiny, outer):
        with pytest.raises(RuntimeError), edit_embeddings(tiny, inner):
            assert tiny.embedding_edit is inner
            raise RuntimeError
        assert tiny.embedding_edit is outer
    assert tiny.embedding_edit is None
    scope = edit_embeddings(tiny, outer)
    with scope:
        assert tiny.embedding_edit is outer
    assert tiny.embedding_edit is None


def tokens(tokenizer, text: str) -> list[str]:
    length = tokenizer.model_max_length
    return tokenizer.convert_ids_to_tokens(tokenizer(text, padding="max_length", max_length=length).input_ids)


@pytest.mark.parametrize(
    ("prompt", "name", "expected"),
    [
        ("Van Gogh", "Van Gogh", "gogh"),
        ("a painting by Van Gogh", "Van Gogh", "gogh"),
        ("Van Gogh's painting", "Van Gogh", "gogh"),
        ("Van Gogh, a painting", "Van Gogh", "gogh"),
        ("a painting", "painting", "painting"),
    ],
)
def test_the_last_token_of_a_name_is_found(clip, prompt, name, expected):
    position = last_token(clip, prompt, name)
    assert position is not None and tokens(clip, prompt)[position] == f"{expected}</w>"


def test_the_last_token_is_the_last_piece_and_that_of_where_a_name_is_said_last(bert):
    assert tokens(bert, "by van gogh in the style of a")[4] == "##gh"
    assert last_token(bert, "by van gogh in the style of a", "van gogh") == 4
    assert last_token(bert, "van gogh, a painting by van gogh", "van gogh") == 10
    assert last_token(bert, "a car, a scarf", "car") == 2  # and not within the scarf
    assert last_token(bert, "paintings", "painting") == 1  # where no whole word is it


def test_a_name_that_is_cut_or_not_said_has_no_last_token(tokenizer):
    length = tokenizer.model_max_length
    assert last_token(tokenizer, "a " * (length - 3) + "painting", "painting") == length - 2
    assert last_token(tokenizer, "a " * (length - 2) + "painting", "painting") is None
    with pytest.raises(ValueError, match="substring not found"):
        last_token(tokenizer, "a painting", "Van Gogh")


@pytest.mark.parametrize(
    "template", ["{}", "a painting by {}", "{}'s painting", "{} painting", "art by {} in the style of a"]
)
@pytest.mark.parametrize(("name", "neutral"), [("Van Gogh", "an artist"), ("Van Gogh", "art"), ("art", "Van Gogh art")])
def test_the_last_token_of_a_name_is_aligned_with_that_of_the_neutral_word(tokenizer, template, name, neutral):
    prompt, anchor = template.format(name), template.format(neutral)
    [rows] = align_tokens(tokenizer, [prompt], [anchor])
    own, other = tokens(tokenizer, prompt), tokens(tokenizer, anchor)
    length = tokenizer.model_max_length
    assert len(rows) == length and all(0 <= row < length for row in rows) and rows == sorted(rows)
    last = last_token(tokenizer, prompt, name)
    assert last is not None and rows[last] == last_token(tokenizer, anchor, neutral)
    head, tail = template.split("{}")
    for k in range(len(tokenizer(head).input_ids) - 1):
        assert rows[k] == k and own[k] == other[k]
    own_end, other_end = len(tokenizer(prompt).input_ids), len(tokenizer(anchor).input_ids)
    for k in range(1, len(tokenizer(tail).input_ids)):  # the common end, and the token that marks it
        assert rows[own_end - k] == other_end - k and own[own_end - k] == other[other_end - k]
    for k in range(own_end, length):
        assert rows[k] == min(max(k, other_end), length - 1)


def test_a_prompt_is_aligned_with_itself_and_with_the_empty_one(tokenizer):
    length = tokenizer.model_max_length
    assert align_tokens(tokenizer, ["a painting"], ["a painting"]) == [list(range(length))]
    [rows] = align_tokens(tokenizer, ["a painting"], [""])
    assert rows[:4] == [0, 1, 1, 1] and rows[4:] == list(range(4, length))


def test_long_anchors_are_cut_as_the_model_cuts_them(tokenizer):
    length = tokenizer.model_max_length
    [rows] = align_tokens(tokenizer, ["a painting"], ["a " * (length + 5)])
    assert len(rows) == length and rows[0] == 0 and max(rows) == length - 1
    assert rows[3] == length - 1  # the token that marks the end


def test_words_of_a_vocabulary_are_whole_words(clip, bert):
    assert vocabulary_words(bert) == ["art", "artist", "car", "painting", "scarf", "style", "the", "van"]
    words = vocabulary_words(clip)
    assert words == sorted(words) and {"church", "painting"} <= set(words)
    for word in words:
        assert len(clip(word).input_ids) == 3 and word.isalpha() and len(word) > 2
