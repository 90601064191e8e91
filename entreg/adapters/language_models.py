"""Stock language models of ``transformers``: the packaged one, those of a folder or of the hub, and random ones.

What is wrong with a model is said in one sentence before its weights are read. No code that comes with a model is
ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from entreg.atomic import folder_atomic
from entreg.data.assets import ASSETS, asset_path, cache_directory
from entreg.data.hub import hub_folder, is_hub_name
from entreg.errors import AssetError, ConfigError, InputError, first_line
from entreg.names import listed_files, require_known, suggestion

PACKAGED_MODELS = ("smollm2",)
"""Models that come as assets (:mod:`entreg.data.assets`): SmolLM2-135M-Instruct."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_2_7b": (
        "llama",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "tie_word_embeddings": False,
        },
    ),
    "mistral_7b": (
        "mistral",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "tie_word_embeddings": False,
        },
    ),
    "phi_2": (
        "phi",
        {
            "vocab_size": 51_200,
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu_new",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.4},
            "bos_token_id": 50_256,
            "eos_token_id": 50_256,
            "tie_word_embeddings": False,
        },
    ),
    "smollm2_135m": (
        "llama",
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
            "tie_word_embeddings": True,
        },
    ),
}
"""Architectures of :func:`random_language_model`: model type and configuration as published with LLaMA-2 7B, Mistral-7B
v0.1 (sliding window 4096), Phi-2 and SmolLM2-135M."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, ready to be used.

    Attributes:
        model: of ``transformers``, in evaluation mode, of one dtype and on one device.
        tokenizer: of ``transformers``; None for random models.
        name: as asked for.
        revision: for run records: ``source`` and what tells this version from others (``sha256`` of the packaged file,
            ``commit`` of the hub, ``sha256`` over a folder, ``seed`` of random weights).
    """

    model: nn.Module
    tokenizer: Any
    name: str
    revision: dict[str, str]


def load_language_model(
    name: str, *, dtype: str = "float32", device: str = "cpu", attention: str = "sdpa"
) -> LanguageModel:
    """A causal language model with its tokenizer.

    Args:
        name: ``smollm2`` (SmolLM2-135M-Instruct, its 4-bit weights dequantised; converted once and cached), a folder as
            ``save_pretrained`` writes it, a ``.gguf`` file, or a name on the Hugging Face hub such as
            ``meta-llama/Llama-2-7b-hf``.
        dtype: of weights and activations: one of :data:`DTYPES`.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...; weights go there without a copy in main memory.
        attention: implementation as ``transformers`` names it: ``sdpa``, ``eager``, ``flash_attention_2`` ...

    Raises:
        ConfigError: the dtype or device is unknown or impossible here, or the model is not a causal decoder that
            ``transformers`` itself knows.
        AssetError: the model is missing, gated, unreachable, incomplete or truncated.
        OutputError: the cache folder cannot be written.
    """
    torch_dtype, torch_device = _dtype_and_device(dtype, device)
    folder, revision = _located(name)
    if len(revision) == 1:
        revision["sha256"] = _folder_sha256(folder)
    tokenizer = _read_tokenizer(folder, name)
    model = _read_model(folder, name, torch_dtype, torch_device, attention)
    return LanguageModel(model, tokenizer, name, revision)


def require_language_model(name: str) -> None:
    """Make sure that a model is there, whole and a causal decoder; what the hub has is fetched, nothing is loaded.

    Args:
        name: as for :func:`load_language_model`.

    Raises:
        ConfigError, AssetError, OutputError: as :func:`load_language_model`.
    """
    _located(name)


def require_named(name: str) -> None:
    """Make sure that a name can be that of a model; a folder that is here is looked into, the hub is not asked.

    Args:
        name: as for :func:`load_language_model`.

    Raises:
        AssetError: it is neither a packaged model nor a file or folder that is there nor like a name of the hub.
        ConfigError, AssetError: the folder holds no whole causal decoder.
    """
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise AssetError(f"there is no file {name}; {_NAME_A_MODEL}")
    elif name not in PACKAGED_MODELS and path.is_dir():
        _require_causal(path, name)
        _require_whole_weights(path)
    elif name not in PACKAGED_MODELS and not is_hub_name(name):
        raise AssetError(f"there is no folder {name} with a language model; {_NAME_A_MODEL}")


def _located(name: str) -> tuple[Path, dict[str, str]]:
    """The folder of a whole causal decoder, and what is known of its revision."""
    require_named(name)
    if name in PACKAGED_MODELS:
        asset = ASSETS[name]
        folder = _converted(name, asset.member_sha256)
        revision = {"source": asset.requirement, "sha256": asset.member_sha256}
    elif name.endswith(".gguf"):
        folder = _converted(name, _file_sha256(Path(name).expanduser()))
        revision = {"source": name, "sha256": folder.name.partition("-")[0]}
    elif Path(name).expanduser().is_dir():
        return Path(name).expanduser(), {"source": name}
    else:
        # The configuration first: what is wrong with it need not wait for gigabytes of weights.
        _require_causal(hub_folder(name, ["config.json"], keys=_KEYS), name)
        folder = hub_folder(name, _HUB_FILES, keys=_KEYS)
        revision = {"source": name, "commit": folder.name}
    _require_causal(folder, name)
    _require_whole_weights(folder)
    return folder, revision


def random_language_model(
    architecture: str,
    options: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    attention: str = "sdpa",
    seed: int = 0,
) -> LanguageModel:
    """A model of a published architecture with random weights: its speed is the real one's, its text is noise.

    Args:
        architecture: one of :data:`ARCHITECTURES`.
        options: fields of its configuration in place of the published ones, e.g. ``{"num_hidden_layers": 2}``.
        dtype, device, attention: as in :func:`load_language_model`; weights are made in this dtype on this device.
        seed: of the weights; the random state of the process is left as it was.

    Raises:
        ConfigError: unknown architecture or field, sizes that do not fit each other, or as in
            :func:`load_language_model`.
    """
    require_known([architecture], ARCHITECTURES, "architecture")
    torch_dtype, torch_device = _dtype_and_device(dtype, device)
    transformers = _transformers()
    kind, published = ARCHITECTURES[architecture]
    known = transformers.AutoConfig.for_model(kind).to_dict()
    for field in options or {}:
        if field not in known:
            raise ConfigError(f"the configuration of {architecture} has no field '{field}'{suggestion(field, known)}")
    cuda = [torch_device] if torch_device.type == "cuda" else []
    try:
        config = transformers.AutoConfig.for_model(kind, **{**published, **(options or {})})
    # Fields of a wrong type and sizes that do not fit end in several classes of errors.
    except Exception as error:
        why = first_line(error.__cause__ or error)
        raise ConfigError(f"a {architecture} with {dict(options or {})} cannot be made: {why}") from error
    try:
        with torch.random.fork_rng(devices=cuda), torch.device(torch_device):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch_dtype, attn_implementation=attention
            )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{architecture} cannot be used with attention={attention}: {first_line(error)}") from error
    revision = {"source": f"{architecture}, random weights", "seed": str(seed)}
    return LanguageModel(model.eval(), None, architecture, revision)


def max_context(model: nn.Module) -> int:
    """The longest sequence that a model's positions are made for, in tokens."""
    return int(model.config.get_text_config().max_position_embeddings)


def require_context(model: nn.Module, length: int, name: str = "the model") -> None:
    """Make sure that a model can take sequences of this length.

    Args:
        model: of ``transformers``.
        length: tokens of prompt and continuation together.
        name: of the model, for the sentence of the error.

    Raises:
        InputError: it cannot.
    """
    longest = max_context(model)
    if length > longest:
        raise InputError(f"a context of {length} tokens is longer than the {longest} that {name} is made for")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("language models need transformers: pip install 'entreg[llm]'") from error
    return transformers


def _dtype_and_device(dtype: str, device: str) -> tuple[torch.dtype, torch.device]:
    require_known([dtype], DTYPES, "dtype")
    try:
        found = torch.device(device)
        # Says at once whether the device is there and does arithmetic in this dtype.
        probe = torch.ones(16, 16, dtype=DTYPES[dtype], device=found)
        probe @ probe
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"{dtype} on the device '{device}' is impossible here: {first_line(error)}") from error
    if found.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"the device '{device}' cannot do bfloat16; take float16 or float32")
    return DTYPES[dtype], found


_KEYS = "MODEL= of make or model.name="
_NAME_A_MODEL = (
    f"name one, or {', '.join(PACKAGED_MODELS)}, or a model of the hub such as meta-llama/Llama-2-7b-hf, as {_KEYS}"
)
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def _read_config(folder: Path, name: str) -> Any:
    transformers = _transformers()
    path = folder / "config.json"
    if not path.is_file():
        raise AssetError(
            f"{folder} holds no config.json ({listed_files(folder)}): it is no model as save_pretrained writes it; "
            f"{_NAME_A_MODEL}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = fields["model_type"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise AssetError(f"{path} is no configuration of a model, damaged or truncated; fetch it again") from error
    if kind not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"{name} is of the architecture '{kind}', which transformers {transformers.__version__} does not know; "
            "code that comes with a model is not run"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise AssetError(f"{path} does not fit the architecture '{kind}': {first_line(error)}") from error


def _require_causal(folder: Path, name: str) -> None:
    config = _read_config(folder, name)
    mapping = _transformers().MODEL_FOR_CAUSAL_LM_MAPPING
    architectures = getattr(config, "architectures", None) or []
    other = [kind for kind in architectures if not kind.endswith(("ForCausalLM", "LMHeadModel", "Model"))]
    if config.is_encoder_decoder or type(config) not in mapping or other:
        what = other[0] if other else config.model_type
        raise ConfigError(f"{name} is a {what}, not a causal language model (a decoder such as LLaMA, Mistral or Phi)")


def _require_whole_weights(folder: Path) -> None:
    """Every file of the weights is there and as long as its header says; nothing else of it is read."""
    if (folder / "adapter_config.json").exists():
        # transformers would add it to the weights, or to those of yet another folder that it names.
        raise AssetError(f"{folder} holds an adapter, adapter_config.json: merge it into the model, or move it away")
    for path in _weight_files(folder):
        if not path.is_file():
            raise AssetError(f"{folder} lacks {path.name}, which its index lists; fetch it again")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise AssetError(f"{path} is damaged or truncated ({first_line(error)}); fetch it again") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: those that the configuration names, else the single one, else the shards."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    if name is None:
        names = ("model.safetensors", "model.safetensors.index.json")
        name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        raise AssetError(f"{folder} holds no model.safetensors, and no index of several such files")
    path = folder / name
    if not path.is_file():
        raise AssetError(f"{folder} lacks {name}, which its config.json names as transformers_weights; fetch it again")
    if not name.endswith(".index.json"):
        return [path]
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / shard for shard in sorted(set(shards))]
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise AssetError(f"{path} is no index of weights, damaged or truncated; fetch it again") from error


def _read_tokenizer(folder: Path, name: str) -> Any:
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # A missing or damaged file of a tokenizer ends in errors of three libraries.
    except Exception as error:
        raise AssetError(f"{name} has no tokenizer that can be read in {folder}: {first_line(error)}") from error


def _read_model(folder: Path, name: str, dtype: torch.dtype, device: torch.device, attention: str) -> nn.Module:
    transformers = _transformers()
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    try:
        with _quiet(transformers):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=False,
                output_loading_info=True,
                use_safetensors=True,
                **placed,
            )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{name} cannot be used with attention={attention}: {first_line(error)}") from error
    except (SafetensorError, OSError, KeyError) as error:
        raise AssetError(f"the weights of {name} in {folder} cannot be read: {first_line(error)}") from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "size" not in str(error):
            raise
        raise AssetError(f"the weights of {name} in {folder} are not of its configuration") from error
    _require_no_gaps(report, f"{name} in {folder}")
    return model.eval()


def _require_no_gaps(report: Mapping[str, Any], what: str) -> None:
    """What transformers does not find it fills with random numbers, and says so in a warning only."""
    wrong = sorted(report["missing_keys"]) or sorted(map(str, report["mismatched_keys"]))
    if wrong:
        raise AssetError(f"the weights of {what} are not of its configuration: they lack {wrong[0]}")


@contextlib.contextmanager
def _quiet(transformers: Any) -> Any:
    """No progress bars: what is wrong is said by errors."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _converted(name: str, sha256: str) -> Path:
    """The folder in the cache with a GGUF file's model in float32, made when it is not there.

    Dequantising takes most of a minute, reading the result a second. The cache's own checksums are compared each time.
    """
    transformers = _transformers()
    folder = cache_directory() / "dequantised" / f"{sha256}-transformers-{transformers.__version__}"
    sums = folder / "SHA256SUMS"
    if sums.is_file():
        if sums.read_text(encoding="utf-8") != _checksums(folder):
            raise AssetError(f"{folder} is damaged (its checksums differ); delete it and run again")
        return folder
    path = asset_path(name) if name in PACKAGED_MODELS else Path(name).expanduser()
    tokenizer, model = _read_gguf(path)
    with folder_atomic(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        for file in new.iterdir():
            # Weights come readable for their owner only.
            file.chmod(0o644)
        (new / "SHA256SUMS").write_text(_checksums(new), encoding="utf-8")
    return folder


def _read_gguf(path: Path) -> tuple[Any, nn.Module]:
    transformers = _transformers()
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"reading {path.name} needs the package gguf: pip install gguf") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        read, report = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    # A truncated file ends in errors of numpy and of the reader, an unsupported one in those of transformers.
    except Exception as error:
        raise AssetError(f"{path} cannot be read, truncated or of an unsupported kind: {first_line(error)}") from error
    _require_no_gaps(report, str(path))
    # A model read from GGUF calls itself quantised and refuses to be saved; a fresh one with its weights does not.
    config = type(read.config).from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return tokenizer, model


def _checksums(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "SHA256SUMS")
    return "".join(f"{_file_sha256(path)}  {path.name}\n" for path in files)


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AssetError(f"{path} cannot be read: {error.strerror}") from error


def _folder_sha256(folder: Path) -> str:
    """SHA-256 over the configuration and, of each file of weights, name, size, header and 16 samples of 64 KiB.

    Reading tens of gigabytes whole would cost minutes; weights that differ at all differ nearly everywhere.
    """
    digest = hashlib.sha256()
    for path in [folder / "config.json", *_weight_files(folder)]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for sample in range(17):
                file.seek(size * sample // 17)
                digest.update(file.read(2**16))
    return digest.hexdigest()
