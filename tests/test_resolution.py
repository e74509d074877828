"""From a model to its kernels: the catalogue first, then the Hub, then the untrained state with one warning."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hub_server import OWNER_TOKEN
from huggingface_hub import constants
from test_families import distinct_llama
from test_hub_files import contents
from test_hub_publish import publishable
from transformers import AutoModelForCausalLM

from less_cache import H2O, LESSCache, LESSConfig, LESSError, LESSKernels, SinkRecent
from less_cache.hub import card, catalogue, publish
from less_cache.integration.families import fingerprint
from less_cache.kernels.folder import CONFIG_NAME

HUB = Path(__file__).parents[1] / "hub"


@pytest.fixture
def model():
    return tiny.tiny_llama()


@pytest.fixture
def catalogued(monkeypatch, tmp_path):
    """A catalogue with one set for `model`, in a folder and on the Hub."""
    publishable().save_pretrained(tmp_path / "tiny-h2o")
    entry = {"fingerprint": fingerprint(tiny.tiny_llama()), "folder": "tiny-h2o", "repo_id": "someone/catalogued"}
    (tmp_path / "catalogue.json").write_text(json.dumps({"org/tiny": [entry]}))
    monkeypatch.setattr(catalogue, "PATHS", (tmp_path / "absent.json", tmp_path / "catalogue.json"))
    return tmp_path / "tiny-h2o"


@pytest.fixture
def nothing_catalogued(monkeypatch):
    monkeypatch.setattr(catalogue, "PATHS", ())


def put(hub, tmp_path, repo_id: str, **changes):
    """Published kernels."""
    folder = tmp_path / repo_id
    publishable(**changes).save_pretrained(folder)
    return hub.create(repo_id, publish.contents(folder, repo_id))


@pytest.mark.parametrize("name", ["org/tiny", "/somewhere/model.gguf", ""])
def test_catalogue_knows_the_weights_whatever_their_path(hub, catalogued, model, caplog, name):
    model.name_or_path = model.config.name_or_path = name
    with caplog.at_level(logging.INFO, "less_cache"):
        cache = LESSCache.for_model(model, budget=12)
    assert cache.kernels.source == str(catalogued) and str(catalogued) in caplog.text
    assert cache.policy == H2O.from_budget(12)
    assert not hub.log, "the Hub is not asked"


def save_gguf(model, path: Path) -> None:
    """The model with matrices in 8 bit, norms in float32, as converters write them."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need the extra")
    pytest.importorskip("accelerate", reason="GGUF files need the extra")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values, kind = parameter.detach().float().numpy(), gguf.GGMLQuantizationType.F32
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_weights_are_known_from_a_folder_and_from_a_gguf_file(hub, catalogued, tmp_path, form):
    """Also quantised, and under any name; another training run's are not."""
    original = distinct_llama(intermediate_size=64).to(torch.bfloat16)  # 8-bit blocks are of 32
    publishable(base_model_fingerprint=fingerprint(original)).save_pretrained(catalogued)
    entries = json.loads((tmp_path / "catalogue.json").read_text())
    entries["org/tiny"][0]["fingerprint"] = fingerprint(original)
    (tmp_path / "catalogue.json").write_text(json.dumps(entries))

    def loaded(model, name: str):
        folder = tmp_path / name
        folder.mkdir()
        if form == "gguf":
            save_gguf(model, folder / "any.gguf")
            return AutoModelForCausalLM.from_pretrained(folder, gguf_file="any.gguf")
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder)

    same = loaded(original, "anything")
    assert form == "folder" or not torch.equal(same.lm_head.weight, original.lm_head.weight.float()), "quantised"
    assert LESSCache.for_model(same).kernels.source == str(catalogued)
    assert not hub.log
    with pytest.warns(UserWarning, match="No kernels"):
        LESSCache.for_model(loaded(distinct_llama(seed=1, intermediate_size=64), "other"))


def test_a_cache_from_the_hub(hub, model, tmp_path):
    """Revision, token, policy and budget reach where they belong."""
    repository = hub.create("someone/private", publish_files(tmp_path / "first"), private=True)
    repository.refs["v1"] = repository.refs["main"]
    repository.commit(publish_files(tmp_path / "second", seed=1))
    options = {"token": OWNER_TOKEN, "revision": "v1"}
    cache = LESSCache.from_pretrained("someone/private", model, budget=10, **options)
    assert cache.policy == H2O(5, 5) and repository.refs["v1"] in cache.kernels.source
    newest = LESSCache.from_pretrained("someone/private", model, policy=SinkRecent(1, 2), token=OWNER_TOKEN)
    assert newest.policy == SinkRecent(1, 2) and repository.refs["main"] in newest.kernels.source
    with pytest.raises(LESSError, match="log in"):
        LESSCache.from_pretrained("someone/private", model)


def publish_files(folder: Path, seed: int = 0) -> dict[str, bytes]:
    publishable(seed).save_pretrained(folder)
    return contents(folder)


def test_catalogue_knows_a_config_by_name(catalogued, model):
    model.config.name_or_path = "org/tiny"
    assert LESSCache.for_model(model.config).kernels.source == str(catalogued)


def test_catalogue_s_repository_where_the_folder_is_not(hub, catalogued, tmp_path, model):
    hub.create("someone/catalogued", contents(catalogued))
    catalogued.rename(tmp_path / "elsewhere")
    assert "someone--catalogued" in LESSCache.for_model(model).kernels.source


@pytest.mark.usefixtures("nothing_catalogued")
@pytest.mark.parametrize("name", ["org/tiny", "/somewhere/model.gguf"], ids=["by base model", "by fingerprint"])
def test_the_hub(hub, tmp_path, model, caplog, name):
    """Repositories that are damaged or for other weights are passed over."""
    model.name_or_path = name
    damaged = put(hub, tmp_path, "someone/damaged")
    damaged.commit({**damaged.files, CONFIG_NAME: b"{"})
    put(hub, tmp_path, "someone/for-other-weights", base_model_fingerprint="0" * 64)
    put(hub, tmp_path, "someone/for-another-model", base_model="org/other", base_model_fingerprint="1" * 64)
    put(hub, tmp_path, "someone/right")
    cache = LESSCache.for_model(model, policy=SinkRecent(2, 6))
    assert "someone--right" in cache.kernels.source and cache.policy == SinkRecent(2, 6)
    assert "someone/right, found in the Hub" in caplog.text


@pytest.mark.usefixtures("nothing_catalogued")
@pytest.mark.parametrize("failure", [{"hang": True}, {"status": 500}, {"status": 429}, {"cut_at": 0}], ids=str)
def test_a_hub_that_does_not_answer_is_a_reason(hub, model, failure):
    model.name_or_path = "org/tiny"
    with hub.failing(".*", **failure), pytest.warns(UserWarning, match="The search for kernels on the Hub: "):
        assert not LESSCache.for_model(model).kernels.is_trained


UNREACHABLE = {
    "nobody at the port": "http://127.0.0.1:9",
    "nobody answers": "http://127.0.0.1:{port}",  # the system takes the connection, and that is all
    "no such name": "http://no-such-name.invalid",
}
SCRIPT = """
import json, sys, time, warnings, tiny
from huggingface_hub import constants
from less_cache import LESSCache
from less_cache.hub import catalogue, client

catalogue.PATHS, client.SEARCH_PATIENCE = (), 1.5
warnings.simplefilter("always")  # the same for every endpoint
seconds = {}
for endpoint in sys.argv[1:]:
    constants.ENDPOINT = endpoint
    model = tiny.tiny_llama()
    model.name_or_path = "org/tiny"
    print(endpoint, file=sys.stderr, flush=True)
    start = time.monotonic()
    assert not LESSCache.for_model(model).kernels.is_trained
    seconds[endpoint] = time.monotonic() - start
print(json.dumps(seconds))
"""


def test_a_hub_that_cannot_be_reached_takes_one_short_try_and_one_line():
    """In a process of its own, where the client really waits between its tries; the warning has a line of code beneath it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parent)}
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        endpoints = [endpoint.format(port=deaf.getsockname()[1]) for endpoint in UNREACHABLE.values()]
        command = [sys.executable, "-c", SCRIPT, *endpoints]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    seconds, said = json.loads(done.stdout), done.stderr
    for endpoint in reversed(endpoints):
        said, _, lines = said.partition(f"{endpoint}\n")
        assert seconds[endpoint] < 3
        assert lines.count("\n") <= 2 and "The search for kernels on the Hub: the Hub cannot be reached" in lines
    assert not said


@pytest.mark.usefixtures("nothing_catalogued")
@pytest.mark.parametrize("failure", [{"hang": True}, {"status": 500}, {"status": 503}, {"status": 429}, {"cut_at": 0}], ids=str)
def test_a_search_asks_once_and_the_client_says_nothing(hub, model, failure, caplog):
    model.name_or_path = "org/tiny"
    with hub.failing(".*", **failure), pytest.warns(UserWarning, match="The search for kernels on the Hub: ") as caught:
        LESSCache.for_model(model)
    assert len(hub.log) == len(caught) == 1 and not caplog.records


def test_a_hub_that_gave_no_answer_is_not_asked_again(hub, catalogued, tmp_path, model):
    """The catalogue names a repository, of which the first request is lost."""
    catalogued.rename(tmp_path / "elsewhere")
    with hub.failing(".*", hang=True), pytest.warns(UserWarning, match="someone/catalogued.*cannot be reached") as caught:
        assert not LESSCache.for_model(model).kernels.is_trained
    assert len(hub.log) == 1 and str(caught[0].message).count("cannot be reached") == 1


@pytest.mark.usefixtures("nothing_catalogued")
@pytest.mark.parametrize("offline, reason", [(False, "less-cache train"), (True, "HF_HUB_OFFLINE")])
def test_no_kernels_is_one_warning(hub, monkeypatch, model, offline, reason):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.warns(UserWarning, match=f"the untrained state is used.*{reason}") as caught:
        cache = LESSCache.for_model(model, budget=0.25)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert not cache.kernels.is_trained and cache.kernels.source == "untrained"
    assert cache.policy == H2O.from_budget(0.25)


def test_budget_is_the_kernels_policy_at_another_size(catalogued, model):
    for cache in (LESSCache.from_pretrained(catalogued, model, budget=10), LESSCache.for_model(model, budget=10)):
        assert cache.policy == H2O(5, 5)
    assert LESSCache.from_pretrained(catalogued, model).policy == H2O(0.25, 8)
    assert LESSCache.from_pretrained(catalogued, model, SinkRecent(1, 2)).policy == SinkRecent(1, 2)
    with pytest.raises(LESSError, match="expected a budget for the kernels' policy, got budget=10, policy=SinkRecent"):
        LESSCache.from_pretrained(catalogued, model, SinkRecent(1, 2), budget=10)
    with pytest.raises(LESSError, match="expected budget to be an int"):
        LESSCache.for_model(model, budget=0)


def test_the_catalogue_is_what_the_folders_say():
    described = {
        (config.base_model, config.base_model_fingerprint, path.parent.name)
        for path in HUB.glob(f"*/{CONFIG_NAME}")
        if (config := LESSConfig.from_json(path.read_text()))
    }
    entries = json.loads((HUB / "catalogue.json").read_text())
    listed = {(name, entry["fingerprint"], entry["folder"]) for name, sets in entries.items() for entry in sets}
    assert described and listed == described


@pytest.mark.parametrize("folder", sorted(path.parent for path in HUB.glob(f"*/{CONFIG_NAME}")), ids=lambda folder: folder.name)
def test_published_sets_load_and_their_cards_are_what_would_be_written_now(folder):
    config = LESSKernels.from_pretrained(folder).config
    assert config.sha256 is not None
    plot = (folder / card.PLOT_NAME).exists()
    companions = publish.companions(folder, config, f"hub/{folder.name}", plot=plot)
    assert (folder / publish.CARD_NAME).read_bytes() == companions[publish.CARD_NAME]


def test_published_code_is_the_package_s():
    copies = list(HUB.glob("*/custom_generate/*"))
    assert copies
    for path in copies:
        assert path.read_bytes() == (publish.CUSTOM_GENERATE / path.name).read_bytes()
