"""Models from the hub, over a stand-in for the hub client."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors as hub_errors

from mka_export.errors import MkaError, SourceError, UnsupportedError
from mka_export.models import hub
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.expected import expected_outline, fetch_need
from mka_export.models.sources import fetch, resolve
from mka_export.needs import Need
from mka_export.progress import Progress
from mka_export.publish import write_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
QUIET = Progress(quiet=True)


class FakeHub:
    """The hub client's two functions, over a folder. ``online`` and ``cached`` say what works."""

    def __init__(self, folder: Path, snapshots: Path) -> None:
        self.folder, self.snapshots = folder, snapshots
        self.names = [p.name for p in folder.iterdir()]
        self.file_size = 1000
        self.asked: list[Any] = []
        self.info_error: Exception | None = None
        self.download_error: Exception | None = None

    def model_info(self, model: str, *, revision: str | None = None, files_metadata: bool) -> SimpleNamespace:
        if self.info_error:
            raise self.info_error
        siblings = [SimpleNamespace(rfilename=name, size=self.file_size) for name in self.names]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def snapshot_download(
        self,
        model: str,
        *,
        revision: str | None,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        final = self.snapshots / COMMIT
        if local_files_only:
            if not (final / "model.safetensors").exists():
                raise hub_errors.LocalEntryNotFoundError("not cached")
            return str(final)
        assert allow_patterns is not None
        if self.download_error:
            raise self.download_error
        self.asked.append((revision, allow_patterns))
        final.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copyfile(path, final / path.name)
        return str(final)


@pytest.fixture
def fake_hub(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    repository = shutil.copytree(pico_llama, tmp_path / "repository")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "modeling_evil.py", "LICENSE", "USE_POLICY.md"):
        (repository / name).write_text("x")
    (repository / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    fake = FakeHub(repository, tmp_path / "snapshots")
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    return fake


def http_error(kind: type[hub_errors.HfHubHTTPError], status: int) -> hub_errors.HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, status_code=status, request=None)
    return kind(f"{status}", response=response)


def test_a_hub_model_is_fetched_and_pinned(fake_hub: FakeHub, tmp_path: Path) -> None:
    fetched = fetch(resolve("org/model", revision="v1"), tmp_path / "cache", QUIET)
    assert fetched.provenance == {"kind": "hub", "id": "org/model", "revision": COMMIT}
    assert Checkpoint.open(fetched.path).num_layers == 6
    names = {p.name for p in fetched.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= names
    assert not names & {"pytorch_model.bin", "consolidated.safetensors", "modeling_evil.py"}
    assert {revision for revision, _ in fake_hub.asked} == {"v1"}
    assert fetched.licence.id == "llama3.2"
    assert set(fetched.licence.files) == {"LICENSE", "USE_POLICY.md"}


def test_an_unsupported_config_is_refused_before_the_weights_travel(fake_hub: FakeHub, tmp_path: Path) -> None:
    write_json(fake_hub.folder / "config.json", {"architectures": ["JambaForCausalLM"]})
    with pytest.raises(UnsupportedError, match="Jamba"):
        fetch(resolve("org/model"), tmp_path, QUIET)
    assert [patterns for _, patterns in fake_hub.asked] == [["config.json"]]


def test_a_model_for_which_there_is_no_room_is_not_fetched(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.file_size = 10**15
    with pytest.raises(MkaError, match=r"fetching org/model needs \d+\.00 GB in .*, .* are free.*HF_HOME"):
        fetch(resolve("org/model"), tmp_path, QUIET)
    assert [patterns for _, patterns in fake_hub.asked] == [["config.json"]]


def test_what_a_hub_model_takes_is_known_from_its_config(fake_hub: FakeHub, tmp_path: Path) -> None:
    source = resolve("org/model")
    model = expected_outline(source)
    assert [patterns for _, patterns in fake_hub.asked] == [["config.json"]]
    weights = (fake_hub.folder / "model.safetensors").stat().st_size
    assert 0.9 * weights < model.nbytes < weights
    assert fetch_need(source, model, tmp_path)[1] == Need(kept=model.nbytes)
    fetch(source, tmp_path, QUIET)
    assert fetch_need(source, model, tmp_path)[1] == Need()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
        (["consolidated.00.pth", "params.json"], "only pickled weights"),
        (["README.md", "model-q4.gguf"], "GGUF files and no checkpoint"),
        (["README.md"], "no config.json with model"),
        (["config.json", "consolidated.safetensors"], "no config.json with model"),
    ],
)
def test_repositories_without_safetensors(fake_hub: FakeHub, names: list[str], said: str, tmp_path: Path) -> None:
    fake_hub.names = names
    with pytest.raises(SourceError, match=said):
        fetch(resolve("org/model"), tmp_path, QUIET)
    assert fake_hub.asked == []


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        (hub_errors.GatedRepoError, 403, "is gated.*https://huggingface.co/org/model.*hf auth login"),
        (hub_errors.RepositoryNotFoundError, 401, "no model org/model, or it is private.*hf auth login"),
        (hub_errors.RevisionNotFoundError, 404, "no revision v9"),
        (hub_errors.HfHubHTTPError, 429, "the hub answered 429"),
    ],
)
def test_refusals_are_explained(
    fake_hub: FakeHub, kind: type[hub_errors.HfHubHTTPError], status: int, said: str, tmp_path: Path
) -> None:
    fake_hub.info_error = http_error(kind, status)
    with pytest.raises(SourceError, match=said):
        fetch(resolve("org/model", revision="v9"), tmp_path, QUIET)


def test_gated_weights_of_a_visible_repository(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.download_error = http_error(hub_errors.GatedRepoError, 403)
    with pytest.raises(SourceError, match="is gated"):
        fetch(resolve("llama3-8b"), tmp_path, QUIET)


def test_a_full_disk_is_not_called_a_network_fault(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.download_error = OSError(errno.ENOSPC, "No space left on device", "/cache")
    with pytest.raises(SourceError, match=r"No space left.*HF_HOME"):
        fetch(resolve("org/model"), tmp_path, QUIET)


OFFLINE = [
    hub_errors.OfflineModeIsEnabled("offline"),
    hub_errors.HTTPError("connection refused"),  # type: ignore[attr-defined]  # httpx's, re-exported
    http_error(hub_errors.HfHubHTTPError, 503),
]


@pytest.mark.parametrize("error", OFFLINE, ids=lambda e: type(e).__name__)
def test_offline_the_hub_clients_cache_serves(fake_hub: FakeHub, error: Exception, tmp_path: Path) -> None:
    online = fetch(resolve("org/model"), tmp_path, QUIET)
    fake_hub.info_error = error
    assert fetch(resolve("org/model"), tmp_path, QUIET) == online


def test_offline_and_not_cached_says_how_to_get_it(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.info_error = OFFLINE[0]
    with pytest.raises(SourceError, match=r"out of reach.*org/model.*HF_HUB_OFFLINE.*its folder"):
        fetch(resolve("org/model"), tmp_path, QUIET)


def test_the_real_client_against_a_closed_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="out of reach"):
        fetch(resolve("mka-export-tests/does-not-exist"), tmp_path, QUIET)


def test_every_error_is_one_line(fake_hub: FakeHub, tmp_path: Path) -> None:
    for error in (*OFFLINE, http_error(hub_errors.GatedRepoError, 403), hub_errors.HFValidationError("bad\nid")):
        fake_hub.info_error = error
        with pytest.raises(MkaError) as caught:
            fetch(resolve("org/model"), tmp_path, QUIET)
        assert "\n" not in str(caught.value)
