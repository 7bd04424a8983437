# SPDX-License-Identifier: Apache-2.0
"""Push and load again, through huggingface_hub's client and a server on loopback."""

import json
import logging
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants

from pretrained import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from pretrained.errors import ArgumentError, CheckpointError, FileError, UnknownArgumentError
from pretrained.text.tokenizer import PreTrainedTokenizer
from support.hub_server import Fault, Repo

SPELLING = Path(__file__).parent / "data" / "spelling-t5"
TINY = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def api(hub):
    def make(token="hf_alice"):
        return HfApi(endpoint=hub.endpoint, token=token, library_name="pretrained")

    return make


@pytest.fixture
def here(hub, tmp_path):
    """Where loads look: the server, and a fresh cache."""
    return {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()


def same(model, other):
    ids = torch.tensor([[3, 4, 5]])
    ours, theirs = model.state_dict(), other.state_dict()
    return (
        list(ours) == list(theirs)
        and all(torch.equal(ours[key], theirs[key]) for key in ours)
        and torch.equal(model(ids).logits, other(ids).logits)
    )


# Push, then load


def test_what_was_pushed_is_what_loads(hub, api, here):
    model = tiny()
    commit = model.push_to_hub("alice/tiny", api=api())
    assert commit.oid == hub.repos["alice/tiny"].refs["main"]
    assert commit.commit_message == "Upload LlamaForCausalLM"
    assert same(model, LlamaForCausalLM.from_pretrained("alice/tiny", **here))
    assert same(model, AutoModelForCausalLM.from_pretrained("alice/tiny", **here))
    assert AutoConfig.from_pretrained("alice/tiny", **here) == model.config
    assert sorted(hub.files("alice/tiny")) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_one_commit_whatever_the_shards(hub, api, here):
    model = tiny()
    model.push_to_hub("tiny", max_shard_size="4kB", api=api())
    repo = hub.repos["alice/tiny"]
    assert len(hub.asked("PUT /upload")) > 2
    assert [title for title, _ in repo.messages] == ["Added", "Upload LlamaForCausalLM"]
    assert same(model, LlamaForCausalLM.from_pretrained("alice/tiny", **here))


def test_variant_revision_message_and_description(hub, api, here):
    model, other = tiny(), tiny(1)
    other.push_to_hub("alice/tiny", api=api())
    model.push_to_hub(
        "alice/tiny",
        variant="half",
        revision="next",
        commit_message="Better",
        commit_description="By far.",
        api=api(),
    )
    assert hub.repos["alice/tiny"].messages[-1] == ("Better", "By far.")
    loaded = LlamaForCausalLM.from_pretrained("alice/tiny", variant="half", revision="next", **here)
    assert same(model, loaded)
    assert same(other, LlamaForCausalLM.from_pretrained("alice/tiny", revision="next", **here))
    assert "model.half.safetensors" not in hub.files("alice/tiny")


def test_pull_request(hub, api, here):
    mine, theirs = tiny(), tiny(1)
    mine.push_to_hub("alice/tiny", api=api())
    commit = theirs.push_to_hub("alice/tiny", create_pr=True, api=api("hf_bob"))
    assert commit.pr_revision == "refs/pr/1"
    assert same(theirs, LlamaForCausalLM.from_pretrained("alice/tiny", revision="refs/pr/1", **here))
    assert same(mine, LlamaForCausalLM.from_pretrained("alice/tiny", **here))
    # More commits onto the open pull request, by its ref.
    tiny(2).push_to_hub("alice/tiny", revision="refs/pr/1", api=api())
    fresh = {**here, "force_download": True}
    assert same(tiny(2), LlamaForCausalLM.from_pretrained("alice/tiny", revision="refs/pr/1", **fresh))


def test_private_needs_the_token(hub, api, here):
    model = tiny()
    model.push_to_hub("alice/secret", private=True, api=api())
    assert hub.repos["alice/secret"].private
    with pytest.raises(FileError, match=r"no repository 'alice/secret' on the Hub, or it is private"):
        LlamaForCausalLM.from_pretrained("alice/secret", **here)
    assert same(model, LlamaForCausalLM.from_pretrained("alice/secret", token="hf_reader", **here))
    # The second address, a CDN's, must never see a token.
    sent = [headers for _, path, headers, _ in hub.requests if path.startswith("/cdn/")]
    assert sent and not any("authorization" in map(str.lower, headers) for headers in sent)


def test_private_never_goes_into_a_public_repository(hub, api):
    hub.add("alice/open", {"notes.txt": b"hello"})
    with pytest.raises(FileError, match=r"'alice/open' exists already and is public, and private=True"):
        tiny().push_to_hub("alice/open", private=True, api=api())
    assert not hub.asked("PUT|preupload|commit")


def test_configs_and_tokenizers(hub, api, here):
    config = LlamaConfig(**TINY)
    config.push_to_hub("alice/parts", api=api())
    GenerationConfig(max_new_tokens=7).push_to_hub("alice/parts", api=api())
    tokenizer = AutoTokenizer.from_pretrained(SPELLING)
    tokenizer.push_to_hub("alice/parts", api=api())
    assert AutoConfig.from_pretrained("alice/parts", **here) == config
    assert GenerationConfig.from_pretrained("alice/parts", **here).max_new_tokens == 7
    again = AutoTokenizer.from_pretrained("alice/parts", **here)
    assert isinstance(again, PreTrainedTokenizer)
    assert again("forty-two").input_ids == tokenizer("forty-two").input_ids
    assert "README.md" not in hub.files("alice/parts")


def test_files_in_subfolders_are_pushed_too(hub, api, here, tmp_path):
    templates = {"default": "{{ 1 }}", "tools": "{{ 2 }}"}
    tokenizer = AutoTokenizer.from_pretrained(SPELLING, chat_template=templates)
    tokenizer.save_pretrained(tmp_path / "saved", push_to_hub=True, api=api())
    assert "additional_chat_templates/tools.jinja" in hub.files("alice/saved")
    assert AutoTokenizer.from_pretrained("alice/saved", **here).chat_template == templates


def test_save_pretrained_pushes_what_it_wrote(hub, api, here, tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "diary.txt").write_text("mine")
    (folder / "README.md").write_text("# My own words\n")
    model = tiny()
    model.save_pretrained(folder, push_to_hub=True, variant="half", max_shard_size="4kB", api=api())
    files = hub.files("alice/tiny")
    assert "diary.txt" not in files
    assert files["README.md"] == b"# My own words\n"
    assert "model.safetensors.index.half.json" in files
    assert same(model, LlamaForCausalLM.from_pretrained("alice/tiny", variant="half", **here))
    model.config.save_pretrained(folder, push_to_hub=True, repo_id="alice/config", api=api())
    assert sorted(hub.files("alice/config")) == [".gitattributes", "config.json"]


def test_old_weights_do_not_win(hub, api, here):
    old, new = tiny(), tiny(1)
    old.push_to_hub("alice/tiny", api=api())
    new.push_to_hub("alice/tiny", max_shard_size="4kB", api=api())
    assert "model.safetensors" not in hub.files("alice/tiny")
    assert same(new, LlamaForCausalLM.from_pretrained("alice/tiny", **here))
    old.push_to_hub("alice/tiny", max_shard_size="9kB", variant="half", api=api())
    old.push_to_hub("alice/tiny", api=api())
    assert sorted(name for name in hub.files("alice/tiny") if "model" in name and "half" not in name) == [
        "model.safetensors"
    ]
    assert same(old, LlamaForCausalLM.from_pretrained("alice/tiny", variant="half", **here))
    with pytest.raises(FileError, match=r"holds model.safetensors, which is loaded instead of pytorch_m"):
        old.push_to_hub("alice/tiny", safe_serialization=False, api=api())
    old.push_to_hub("alice/pickle", safe_serialization=False, api=api())
    assert same(old, LlamaForCausalLM.from_pretrained("alice/pickle", **here))


def test_quantized_and_offloaded_models(hub, api, here, tmp_path):
    tiny().save_pretrained(tmp_path / "plain")
    packed = LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config={"quant_method": "int8"}
    )
    packed.push_to_hub("alice/int8", api=api())
    assert same(packed, LlamaForCausalLM.from_pretrained("alice/int8", **here))
    card = hub.files("alice/int8")["README.md"].decode()
    assert "parameters" not in card and "int8" in card
    on_disk = LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", device_map={"": "cpu", "model.layers.1": "disk"}, offload_folder=tmp_path / "off"
    )
    on_disk.push_to_hub("alice/offloaded", api=api())
    assert same(tiny(), LlamaForCausalLM.from_pretrained("alice/offloaded", **here))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_adapters(hub, api, here, tmp_path):
    peft = pytest.importorskip("peft")
    ids = torch.tensor([[3, 4, 5]])
    tiny().push_to_hub("alice/base", api=api())
    model = LlamaForCausalLM.from_pretrained("alice/base", **here)
    model.add_adapter(
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    model.push_to_hub("alice/adapter", api=api())
    files = hub.files("alice/adapter")
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: alice/base\n---\n")
    assert 'AutoModelForCausalLM.from_pretrained("alice/base")' in card
    assert 'model.load_adapter("alice/adapter")' in card
    again = LlamaForCausalLM.from_pretrained("alice/base", **here)
    again.load_adapter("alice/adapter", **here)
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert not torch.equal(again(ids).logits, tiny()(ids).logits)
    # By the adapter's own name, the base model is fetched too.
    whole = AutoModelForCausalLM.from_pretrained("alice/adapter", **here)
    assert torch.equal(whole(ids).logits, again(ids).logits)


@pytest.mark.slow
def test_transformers_pushes_and_loads_the_same(hub, api, here, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    model, ids = tiny(), torch.tensor([[3, 4, 5]])
    model.push_to_hub("alice/ours", api=api())
    theirs = transformers.LlamaForCausalLM.from_pretrained("alice/ours", cache_dir=tmp_path / "theirs").eval()
    assert torch.allclose(theirs(ids).logits, model(ids).logits, atol=1e-5)
    theirs.push_to_hub("alice/theirs")
    again = LlamaForCausalLM.from_pretrained("alice/theirs", **here)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_pushing_the_same_again_makes_no_commit(hub, api):
    first = tiny().push_to_hub("alice/tiny", api=api())
    assert tiny().push_to_hub("alice/tiny", api=api()).oid == first.oid
    assert len(hub.asked("PUT /upload")) == 1


# The card


def test_card_says_what_the_files_say(hub, api):
    tokenizer = AutoTokenizer.from_pretrained(SPELLING)
    tokenizer.push_to_hub("alice/tiny", api=api())
    model = tiny()
    model.push_to_hub("alice/tiny", tags=["llama", "tiny: model"], api=api())
    card = hub.files("alice/tiny")["README.md"].decode()
    head = card.split("---")[1]
    assert head == (
        '\nlibrary_name: pretrained\npipeline_tag: text-generation\ntags:\n- llama\n- "tiny: model"\n'
    )
    assert f"| parameters | {model.num_parameters():,} |" in card
    assert "| architecture | LlamaForCausalLM (`llama`) |" in card
    assert 'AutoTokenizer.from_pretrained("alice/tiny")' in card
    assert 'AutoModelForCausalLM.from_pretrained("alice/tiny")' in card
    assert "license:" not in card


def test_a_card_that_is_there_keeps_its_words(hub, api):
    words = b"---\nlicense: mit\ntags:\n- old\n---\n# Mine\n"
    hub.add("alice/tiny", {"README.md": words})
    tiny().push_to_hub("alice/tiny", api=api())
    assert hub.files("alice/tiny")["README.md"] == words
    model = tiny()
    model.add_model_tags("new")
    model.push_to_hub("alice/tiny", tags=["old"], api=api())
    assert hub.files("alice/tiny")["README.md"] == words.replace(b"- old", b"- old\n- new")


def test_a_card_that_the_hub_refuses(hub, api):
    hub.add("alice/tiny", {"README.md": b"---\nlicense: bad\n---\n"})
    with pytest.raises(FileError, match=r"The Hub refused the push to 'alice/tiny'.*must be one of those"):
        tiny().push_to_hub("alice/tiny", tags=["x"], api=api())
    hub.add("alice/tiny", {"README.md": b"---\n[\n---\n"})
    with pytest.raises(ArgumentError, match="head cannot be read, so it can be given no tags"):
        tiny().push_to_hub("alice/tiny", tags=["x"], api=api())


# Arguments


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        ({"use_auth_token": "hf_x"}, "It is called token now"),
        ({"use_temp_dir": True}, "always saves into a temporary folder"),
        ({"organization": "alice"}, "Write it in repo_id"),
        ({"repo_url": "x"}, "Pass repo_id="),
        ({"comit_message": "x"}, "Did you mean 'commit_message'"),
    ],
)
def test_retired_and_unknown_arguments(arguments, mend, hub, api, tmp_path):
    with pytest.raises(UnknownArgumentError, match=mend):
        tiny().push_to_hub("alice/tiny", api=api(), **arguments)
    with pytest.raises(UnknownArgumentError, match=mend):
        tiny().save_pretrained(tmp_path / "out", push_to_hub=True, api=api(), **arguments)
    assert not hub.requests and not (tmp_path / "out").exists()


def test_configs_have_no_shards(hub, api):
    with pytest.raises(UnknownArgumentError, match=r"Saving a config does not know .*'max_shard_size'"):
        LlamaConfig(**TINY).push_to_hub("alice/tiny", max_shard_size="1GB", api=api())
    with pytest.raises(UnknownArgumentError, match="belongs to push_to_hub=True"):
        LlamaConfig(**TINY).save_pretrained("x", repo_id="alice/tiny")


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("", {}, "A push needs the name of a repository"),
        ("./out", {}, r"name of a repository .*'name' or 'owner/name'"),
        ("alice/tiny/more", {}, "A push needs the name of a repository"),
        ("alice/tiny", {"token": ""}, "The token is empty, or has blanks"),
        ("alice/tiny", {"token": "hf_alice\n"}, "The token is empty, or has blanks"),
        ("alice/tiny", {"tags": "tiny"}, r"Tags are a list of texts .*tags=\['tiny'\]"),
        ("alice/tiny", {"private": "yes"}, "private is True, False or None"),
    ],
)
def test_arguments_that_cannot_work(name, arguments, text, hub, api):
    with pytest.raises(ArgumentError, match=text) as caught:
        tiny().push_to_hub(name, api=api(), **arguments)
    assert "hf_alice" not in str(caught.value)
    assert not hub.requests


def test_a_token_with_a_line_end_is_not_shown(here):
    with pytest.raises(ArgumentError, match="The token is empty, or has blanks") as caught:
        AutoConfig.from_pretrained("alice/tiny", token="hf_alice\n", **here)
    assert "hf_alice" not in str(caught.value)


# Uploads that fail


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("repos/create", status=401), r"does not know who is pushing to 'alice/tiny'"),
        (Fault("/preupload/", status=403), r"does not let you write to 'alice/tiny'.*create_pr=True"),
        (Fault("PUT /upload", status=403), r"\(main branch, file 'model.safetensors', at http"),
        (Fault("/commit/", status=412), r"'alice/tiny' changed while it was being pushed to"),
        (Fault("/commit/", status=413), r"A file is too large .*smaller max_shard_size"),
        (Fault("repos/create", status=429, headers={"Retry-After": "7"}), r"too many requests .*Wait 7 s"),
        (Fault("/commit/", status=500), r"answered with status 500 to the push .*not sent twice"),
        (Fault("PUT /upload", times=-1, status=503), r"answered with status 503 .*file 'model.safetensors'"),
        (Fault("repos/create", cut=0), r"The connection failed in the push to 'alice/tiny'"),
    ],
)
def test_refusals_say_what_to_do(fault, text, hub, api):
    hub.faults.append(fault)
    with pytest.raises(FileError, match=text) as caught:
        tiny().push_to_hub("alice/tiny", token="hf_alice", api=api())
    message = str(caught.value)
    assert "hf_alice" not in message and "ecret" not in message
    assert "the given token was sent" in message
    assert "README.md" not in hub.files("alice/tiny") if "alice/tiny" in hub.repos else True


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("hf_reader", r"does not let you write to 'alice/tiny'"),
        ("hf_bob", r"does not let you write to 'alice/tiny'"),
        ("hf_wrong", r"does not know who is pushing"),
        (False, r"does not know who is pushing .*no token was sent, since token=False"),
    ],
)
def test_tokens_that_may_not_write(token, text, hub, api):
    with pytest.raises(FileError, match=text):
        tiny().push_to_hub("alice/tiny", token=token, api=api(token))
    assert not hub.objects


def test_a_pull_request_to_a_branch_that_is_not_there(hub, api):
    hub.add("alice/tiny", {"notes.txt": b"hello"})
    with pytest.raises(FileError, match=r"'alice/tiny' has no revision 'dev' \(branch 'dev', at http"):
        tiny().push_to_hub("alice/tiny", revision="dev", create_pr=True, api=api())


def test_a_hub_that_does_not_answer_a_push(hub, api, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.faults.append(Fault("GET /api/models", delay=0.3))
    with pytest.raises(FileError, match=r"did not answer in time to the push .*Push again"):
        tiny().push_to_hub("alice/tiny", api=api())


def test_a_missing_login(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(FileError, match="token=True needs a stored login"):
        tiny().push_to_hub("alice/tiny", token=True)


@pytest.mark.parametrize("part_size", [1 << 40, 2000])
def test_an_upload_that_was_cut_goes_on_where_it_was(part_size, hub, api, here):
    hub.part_size = part_size
    model = tiny()
    model.push_to_hub("alice/probe", max_shard_size="6kB", api=api())
    repo = hub.repos["alice/probe"]
    listing = repo.commits[repo.refs["main"]]
    oids = {oid for kind, oid in listing.values() if kind == "lfs"}
    last = listing[max(name for name in listing if name.startswith("model-"))][1]
    hub.objects.clear()
    # One of the shards never arrives, however often it is tried.
    hub.faults.append(Fault(f"PUT /upload/{last}", times=-1, cut=100))
    with pytest.raises(FileError, match=r"failed .*file 'model-0.*not sent twice"):
        model.push_to_hub("alice/tiny", max_shard_size="6kB", api=api())
    left = oids - set(hub.objects)
    assert last in left and len(left) < len(oids)
    assert list(hub.files("alice/tiny")) == [".gitattributes"]
    hub.faults.clear()
    hub.requests.clear()
    model.push_to_hub("alice/tiny", max_shard_size="6kB", api=api())
    assert {line.split("/")[2] for line in hub.asked("PUT /upload")} == left
    assert same(model, LlamaForCausalLM.from_pretrained("alice/tiny", **here))


def test_parts_that_arrived_are_not_sent_again(hub, api, here):
    hub.part_size = 2000
    hub.faults += [Fault(rf"PUT /upload/\w+/{number}$", cut=100) for number in (3, 6, 9, 12)]
    model = tiny()
    model.push_to_hub("alice/tiny", api=api())
    sent = [path.rpartition("/")[2] for verb, path, _, _ in hub.requests if verb == "PUT"]
    assert sent == [str(number) for number in range(1, 14)]
    assert same(model, LlamaForCausalLM.from_pretrained("alice/tiny", **here))


def test_a_server_without_xet(hub, api, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(FileError, match=r"does not speak Xet, .*Set HF_HUB_DISABLE_XET=1"):
        tiny().push_to_hub("alice/tiny", api=api())


def test_a_cut_that_heals_is_not_noticed(hub, api, here):
    hub.faults += [Fault("PUT /upload", cut=100), Fault("PUT /upload", status=503)]
    model = tiny()
    model.push_to_hub("alice/tiny", api=api())
    assert len(hub.asked("PUT /upload")) >= 2
    assert same(model, LlamaForCausalLM.from_pretrained("alice/tiny", **here))


def test_somebody_else_commits_in_between(hub, api):
    tiny().push_to_hub("alice/tiny", api=api())

    class Slow(HfApi):
        def preupload_lfs_files(self, *args, **kwargs):
            hub.add("alice/tiny", {"notes.txt": b"theirs"})
            return super().preupload_lfs_files(*args, **kwargs)

    slow = Slow(endpoint=hub.endpoint, token="hf_alice")
    # It deletes files, so it must not meet another state of the repository.
    with pytest.raises(FileError, match=r"changed while it was being pushed to .*Push again"):
        tiny(1).push_to_hub("alice/tiny", max_shard_size="4kB", api=slow)
    assert "model.safetensors" in hub.files("alice/tiny")


def test_broken_weights_are_not_pushed(hub, api, tmp_path):
    from pretrained.core.push import files_of, push_files

    tiny().save_pretrained(tmp_path, max_shard_size="4kB")
    (tmp_path / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    shard = sorted(tmp_path.glob("model-*"))[-1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises((CheckpointError, FileError)):
        push_files(tmp_path, files_of(tmp_path), "alice/tiny", commit_message="x", api=api())
    assert not hub.requests


def test_uploads_are_quiet_off_a_terminal(hub, api, capfd):
    tiny().push_to_hub("alice/tiny", max_shard_size="4kB", api=api())
    assert capfd.readouterr() == ("", "")


# Downloads that fail


@pytest.fixture
def pushed(hub, api):
    model = tiny()
    model.push_to_hub("alice/tiny", api=api())
    hub.requests.clear()
    return model


def test_a_download_that_was_cut_goes_on_where_it_was(hub, pushed, here, monkeypatch):
    # The client keeps what it got in pieces of 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.faults.append(Fault("GET /cdn/", cut=1000))
    assert same(pushed, LlamaForCausalLM.from_pretrained("alice/tiny", **here))
    ranges = [h.get("Range") or h.get("range") for v, p, h, _ in hub.requests if v == "GET" and "/cdn/" in p]
    assert ranges == [None, "bytes=1000-"]


def test_a_server_that_is_slow_for_a_moment(hub, pushed, here, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.faults.append(Fault("GET /cdn/", delay=0.4))
    assert same(pushed, LlamaForCausalLM.from_pretrained("alice/tiny", **here))


def test_a_server_that_does_not_answer(hub, pushed, here, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.faults.append(Fault("/api/models/alice/tiny", times=-1, delay=0.3))
    with pytest.raises(FileError, match=r"did not answer in time for 'alice/tiny' .*raise HF_HUB_ETAG_TIME"):
        LlamaForCausalLM.from_pretrained("alice/tiny", **here)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (
            Fault("/cdn/", times=-1, change=lambda body: body[:-1] + b"!"),
            r"(?s)'model.safetensors' of 'alice",
        ),
        (
            Fault("/cdn/", times=-1, change=lambda body: body[:-7]),
            r"did not arrive whole .*model.safetensors",
        ),
    ],
)
def test_a_file_that_is_not_what_was_promised(fault, text, hub, pushed, here):
    hub.faults.append(fault)
    with pytest.raises((FileError, CheckpointError), match=text):
        LlamaForCausalLM.from_pretrained("alice/tiny", **here)
    hub.faults.clear()
    assert same(pushed, LlamaForCausalLM.from_pretrained("alice/tiny", **here))


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault("/cdn/", times=-1, status=500), r"status 500 for 'alice/tiny' .*file 'model.safetensors'"),
        (Fault("/cdn/", times=-1, status=503), r"status 503 for 'alice/tiny' .*file 'model.safetensors'"),
        (Fault("/cdn/", times=-1, status=403), r"refused access to 'alice/tiny' .*file 'model.safetensors'"),
        (Fault("HEAD .*safetensors", times=-1, status=429, headers={"Retry-After": "9"}), r"Wait 9 s"),
        (Fault("HEAD .*safetensors", times=-1, status=404, headers={"X-Error-Code": "EntryNotFound"}),
         r"'alice/tiny' has no file 'model.safetensors'"),
        (Fault("/api/models", times=-1, status=401), r"no repository 'alice/tiny' on the Hub, or it"),
        (Fault("/cdn/", times=-1, cut=0), r"could not be reached|did not arrive"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("force", [False, True])
def test_failures_name_repository_file_and_mend(fault, text, force, hub, pushed, here):
    import copy

    hub.faults.append(copy.copy(fault))
    with pytest.raises(FileError, match=text) as caught:
        LlamaForCausalLM.from_pretrained("alice/tiny", force_download=force, **here)
    assert "Signature" not in str(caught.value)
    assert caught.value.mend
    hub.faults.clear()
    assert same(pushed, LlamaForCausalLM.from_pretrained("alice/tiny", **here))


def test_gated(hub, api, here):
    hub.repos["alice/gated"] = Repo(gated=True)
    hub.add("alice/gated", {"config.json": b"{}"})
    for token in (False, "hf_bob"):
        with pytest.raises(FileError, match=rf"'alice/gated' is gated: .* Ask at {hub.endpoint}/alice/gated"):
            AutoConfig.from_pretrained("alice/gated", token=token, **here)


def test_an_index_that_names_a_file_that_is_not_there(hub, api, here):
    tiny().push_to_hub("alice/tiny", max_shard_size="4kB", api=api())
    repo = hub.repos["alice/tiny"]
    listing = repo.commits[repo.refs["main"]]
    gone = min(name for name in listing if name.startswith("model-"))
    del listing[gone]
    with pytest.raises(CheckpointError, match=rf"names the file '{gone}', which the repository does not"):
        LlamaForCausalLM.from_pretrained("alice/tiny", **here)


# The cache


def test_offline_with_a_warm_and_with_a_cold_cache(hub, pushed, here, monkeypatch, tmp_path):
    for switch in ("argument", "variable"):
        cold = {**here, "cache_dir": tmp_path / switch}
        more = {"local_files_only": True} if switch == "argument" else {}
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        LlamaForCausalLM.from_pretrained("alice/tiny", **here)
        hub.requests.clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switch == "variable")
        assert same(pushed, LlamaForCausalLM.from_pretrained("alice/tiny", **here, **more))
        with pytest.raises(FileError, match=r"not in the download cache, and no download .*Fetch it once"):
            LlamaForCausalLM.from_pretrained("alice/tiny", **cold, **more)
        assert not hub.requests


def test_an_update_on_the_hub_is_seen_and_pinned_versions_stay(hub, api, pushed, here):
    old = hub.repos["alice/tiny"].refs["main"]
    assert same(pushed, LlamaForCausalLM.from_pretrained("alice/tiny", **here))
    tiny(1).push_to_hub("alice/tiny", api=api())
    assert same(tiny(1), LlamaForCausalLM.from_pretrained("alice/tiny", **here))
    assert same(pushed, LlamaForCausalLM.from_pretrained("alice/tiny", revision=old, **here))
    hub.requests.clear()
    assert same(tiny(1), LlamaForCausalLM.from_pretrained("alice/tiny", **here))
    assert not hub.asked("resolve|cdn")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_down_leaves_the_warm_cache(status, hub, pushed, here, caplog):
    LlamaForCausalLM.from_pretrained("alice/tiny", **here)
    hub.faults.append(Fault("/api/models", times=-1, status=status))
    with caplog.at_level(logging.WARNING):
        assert same(pushed, LlamaForCausalLM.from_pretrained("alice/tiny", **here))
    assert "using the cached files of 'alice/tiny'" in caplog.text


def test_force_download_fetches_again(hub, pushed, here):
    LlamaForCausalLM.from_pretrained("alice/tiny", **here)
    blob = next(p for p in (here["cache_dir"]).rglob("model.safetensors")).resolve()
    blob.write_bytes(b"damaged on the disk")
    with pytest.raises(CheckpointError):
        LlamaForCausalLM.from_pretrained("alice/tiny", **here)
    assert same(pushed, LlamaForCausalLM.from_pretrained("alice/tiny", force_download=True, **here))


# Servers that are not to be trusted


def test_names_that_leave_the_folder_stay_out(hub, here, caplog, tmp_path):
    evil = {
        "../evil.json": b"{}",
        "/etc/evil": b"{}",
        "a/../../evil": b"{}",
        "C:/evil": b"{}",
        "..\\evil": b"{}",
    }
    hub.add("alice/tiny", {"config.json": json.dumps(LlamaConfig(**TINY).to_dict()).encode(), **evil})
    with caplog.at_level(logging.WARNING):
        AutoConfig.from_pretrained("alice/tiny", **here)
    assert "lists files outside its folder, which are passed over" in caplog.text
    index = {"metadata": {}, "weight_map": {"a": "../evil.json"}}
    hub.add("alice/tiny", {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        AutoModel.from_pretrained("alice/tiny", **here)
    assert not [p for p in tmp_path.rglob("*evil*")]


def test_a_commit_that_is_a_path(hub, here, tmp_path):
    repo = hub.repos["alice/tiny"] = Repo()
    repo.commits["../../../out"] = {"config.json": ("git", b"{}")}
    repo.refs["main"] = "../../../out"
    with pytest.raises(FileError, match=r"answer about 'alice/tiny' is not one of a Hub .*Check HF_ENDPOINT"):
        AutoConfig.from_pretrained("alice/tiny", **here)
    assert not (tmp_path / "cache").exists()


def test_an_etag_that_is_a_path(hub, pushed, here, tmp_path):
    target = "../../../out.json"
    hub.faults.append(
        Fault("HEAD .*config.json", times=-1, change=lambda body: body, headers={"ETag": f'"{target}"'})
    )
    with pytest.raises((CheckpointError, FileError), match="leaves the download cache"):
        AutoConfig.from_pretrained("alice/tiny", **here)
