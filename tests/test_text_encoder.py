"""A text encoder by itself: what is read of a folder, how prompts are marked and padded, and what is refused."""

import json
import re

import pytest
import torch
from conftest import CPU, is_error
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from ldm.config.everyday import retain_captions
from ldm.diffusion.text_encoder import NUM_TOKENS, load_text_encoder
from ldm.diffusion.text_states import LAST_STATE
from ldm.diffusion.tokenizer import last_piece, last_token, read_part, vocabulary_words

SIZES = {"hidden_size": 96, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
PROMPTS = ["a painting by Picasso", "a dog"]


def byte_pairs() -> FastTokenizer:
    """Return a tokenizer as causal language models have it: it marks beginnings of words, and no end of a prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(retain_captions(200), trainer)
    return FastTokenizer(tokenizer_object=tokenizer, eos_token="<|end|>")


def word_pieces() -> FastTokenizer:
    """Return a tokenizer as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.train_from_iterator(retain_captions(200), trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return FastTokenizer(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folders of three tiny random encoders, by family."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    words, bytes_ = word_pieces(), byte_pairs()
    made = {
        "bert": (words, BertModel(BertConfig(vocab_size=len(words), **SIZES))),
        "clip": (words, CLIPTextModel(CLIPTextConfig(vocab_size=len(words), eos_token_id=3, **SIZES))),
        "llama": (bytes_, LlamaModel(LlamaConfig(vocab_size=len(bytes_), num_key_value_heads=1, **SIZES))),
    }
    for name, (tokenizer, encoder) in made.items():
        tokenizer.save_pretrained(root / name)
        encoder.save_pretrained(root / name)
    return {name: root / name for name in made}


@pytest.mark.parametrize("family", ["bert", "clip", "llama"])
def test_states_are_those_of_a_prompt_alone_and_padding_repeats_its_end(folders, family):
    model = load_text_encoder(folders[family], CPU)
    needed = {"text_encoder": [0, 2, LAST_STATE]}
    embeds, states = model.encode_with_states(PROMPTS, needed)
    assert embeds.shape == (2, NUM_TOKENS, SIZES["hidden_size"]) and embeds.dtype == torch.float32
    assert torch.equal(states["text_encoder", LAST_STATE], embeds) and len(states) == 3
    alone = model.encode_with_states(PROMPTS[1:], needed)[1]
    end = len(model.tokenizers[0](PROMPTS[1]).input_ids) - 1
    for key, state in states.items():
        assert torch.allclose(state[1], alone[key][0], atol=1e-5)
        assert torch.equal(state[1, end:], state[1, end].expand(NUM_TOKENS - end, -1))
    assert not torch.allclose(states["text_encoder", 0], states["text_encoder", 2])
    assert not any(parameter.requires_grad for parameter in model.text_encoders["text_encoder"].parameters())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_prompt_has_a_mark_at_both_ends_so_that_a_names_last_token_is_found(folders, family):
    tokenizer = load_text_encoder(folders[family], CPU).tokenizers[0]
    ids = tokenizer("a painting by Picasso").input_ids
    before = tokenizer("a painting by").input_ids
    assert ids[0] == before[0] and ids[-1] == before[-1] and ids[: len(before) - 1] == before[:-1]
    assert last_token(tokenizer, "a painting by Picasso", "Picasso") == len(ids) - 2
    assert tokenizer("").input_ids == [ids[0], ids[-1]]
    assert read_part(tokenizer, "a dog") is None and read_part(tokenizer, "a dog " * 40).startswith("a dog a dog")


def test_pieces_that_continue_a_word_are_marked_as_in_bert(folders):
    tokenizer = load_text_encoder(folders["llama"], CPU).tokenizers[0]
    words = vocabulary_words(tokenizer)
    said = set(re.findall(r"\w+", " ".join(retain_captions(200))))
    assert len(words) > 50 and said.issuperset(word for word in words if len(word) > 5)
    pieces = tokenizer.tokenize("a windmills")
    assert "".join(pieces).replace("##", "") == "awindmills" and not pieces[1].startswith("##")
    assert "windmills".endswith(last_piece(tokenizer, "a windmills"))
    assert tokenizer.decode(tokenizer("a dog").input_ids, skip_special_tokens=True).strip() == "a dog"


def test_a_folder_that_is_no_text_encoder_is_one_line(folders, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json in .*give `text_encoder`"):
        load_text_encoder(tmp_path, CPU)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"no tokenizer in .*: copy its files there, such as tokenizer\.json"):
        load_text_encoder(tmp_path, CPU)
    (tmp_path / "vocab.txt").write_text("[UNK]")
    with pytest.raises(ValueError, match=r"cannot read a text encoder from .*give `text_encoder` a folder") as caught:
        load_text_encoder(tmp_path, CPU)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(ValueError, match="an encoder with a decoder"):
        load_text_encoder(tmp_path, CPU)


@pytest.mark.parametrize("fault", ["missing", "nan"])
def test_weights_that_are_missing_or_not_finite_are_named(folders, tmp_path, fault):
    for path in folders["bert"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    if fault == "missing":
        del weights[name]
    else:
        weights[name][0, 0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{re.escape(name)}"):
        load_text_encoder(tmp_path, CPU)


def test_a_pooler_may_be_missing(folders, tmp_path):
    for path in folders["bert"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_text_encoder(tmp_path, CPU).name == tmp_path.name


def test_a_model_and_a_text_encoder_are_one_too_many(script, folders):
    arguments = ["--model", "models/mini-sd", "--text_encoder", folders["bert"], "--device", "cpu"]
    is_error(script("eval-scripts/evaluate-gates.py", *arguments), "--text_encoder is given instead of a model")


@pytest.mark.slow
def test_the_script_measures_gates_of_a_text_encoder_alone(script, folders, tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("name,kind,aliases\nMonet,artist,\nNike,brand,\n")
    sizes = ["--retain_captions", 40, "--retain_words", 20, "--compositions", 2, "--misspellings", 2]
    arguments = ["--text_encoder", folders["llama"], "--concepts", path, "--num_captions", 50, "--device", "cpu"]
    code, out, err = script("eval-scripts/evaluate-gates.py", *arguments, *sizes, "--save_path", tmp_path / "out")
    assert code == 0, err
    assert "| keyword filter |" in out
    summary = json.loads((tmp_path / "out" / "gates.json").read_text())
    assert summary["model"] == "llama" and summary["gates"] + len(summary["refused"]) == 2
    assert len((tmp_path / "out" / "detectors.csv").read_text().splitlines()) == 4
