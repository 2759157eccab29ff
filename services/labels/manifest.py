"""Whose labels a directory of label files holds: ``teacher.json`` and, for exact labels, ``head.safetensors``."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches NumPy, and so safetensors, the type bfloat16
from google.protobuf import json_format
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from services.contract.errors import InvalidInputError
from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.tensors import tensor_dtype
from services.labels.cache import label_key

FORMAT = 1
MANIFEST = "teacher.json"
HEAD = "head.safetensors"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``teacher`` is what the server answered to GetTeacher, with the ids of ``probe_texts``, so that a student can
    compare its tokenizer as if the teacher were there. ``head_sha256`` is empty where no head belongs to the labels.
    """

    teacher: pb.GetTeacherResponse
    options: LabelOptions
    probe_texts: tuple[str, ...]
    head_sha256: str = ""

    @property
    def label_dtype(self) -> str:
        """In which hidden states travel, such as bfloat16."""
        return str(tensor_dtype(self.teacher.label_dtype))

    @property
    def identity(self) -> str:
        """Equal for labels that may lie in one directory: of one teacher, made in one way."""
        return label_key(
            fingerprint=self.teacher.fingerprint,
            sequence_hash=b"",
            options=self.options,
            label_dtype=self.label_dtype,
        )


def read_manifest(directory: Path) -> Manifest:
    """InvalidInputError where there is none, or it cannot be read."""
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise InvalidInputError(
                f"{path} has the format {content['format']!r}; this release of smoothkd reads {FORMAT}",
                fix="Read it with the release that wrote it, or export the labels again.",
            )
        teacher = json_format.ParseDict(content["teacher"], pb.GetTeacherResponse(), ignore_unknown_fields=True)
        tensor_dtype(teacher.label_dtype)
        manifest = Manifest(
            teacher=teacher,
            options=_options(content["options"]),
            probe_texts=tuple(content["probe_texts"]),
            head_sha256=content["head_sha256"],
        )
        if content.get("identity", manifest.identity) != manifest.identity:
            raise not_of_this_release(path, "it tells labels apart in another way")
        return manifest
    except FileNotFoundError:
        raise InvalidInputError(
            f"{directory} holds no label files: {MANIFEST} is not there",
            fix="Name a directory that smoothkd labels export has written.",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, json_format.ParseError) as error:
        raise damaged(path, str(error)) from None


def write_manifest(directory: Path, manifest: Manifest, *, head: LmHead | None) -> None:
    """Head first, so that a directory with a manifest is complete but for its labels."""
    digest = ""
    if head is not None:
        unfinished = directory / f".{HEAD}.{os.getpid()}.tmp"
        # safetensors lets nobody else read what it writes; these files are to be shared as any others.
        unfinished.touch()
        readable_as = unfinished.stat().st_mode & 0o777
        tensors = {"weight": head.weight_VD} | ({} if head.bias_V is None else {"bias": head.bias_V})
        save_file(
            tensors, unfinished, metadata={"logit_scale": repr(head.logit_scale), "soft_cap": repr(head.soft_cap)}
        )
        unfinished.chmod(readable_as)
        digest = _sha256(unfinished)
        os.replace(unfinished, directory / HEAD)
    content = {
        "format": FORMAT,
        "teacher": json_format.MessageToDict(manifest.teacher, preserving_proto_field_name=True),
        "options": asdict(manifest.options),
        "probe_texts": list(manifest.probe_texts),
        "head_sha256": digest,
        "identity": manifest.identity,
    }
    unfinished = directory / f".{MANIFEST}.{os.getpid()}.tmp"
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(unfinished, directory / MANIFEST)


def read_head(directory: Path, manifest: Manifest) -> LmHead | None:
    """The teacher's output head, checked; None where these labels need none."""
    if not manifest.head_sha256:
        return None
    path = directory / HEAD
    try:
        if _sha256(path) != manifest.head_sha256:
            raise damaged(path, f"it is not the file that {MANIFEST} names")
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            return LmHead(
                weight_VD=file.get_tensor("weight"),
                bias_V=file.get_tensor("bias") if "bias" in file.keys() else None,  # noqa: SIM118 - it is no mapping
                logit_scale=float(metadata["logit_scale"]),
                soft_cap=float(metadata["soft_cap"]),
            )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise damaged(path, str(error)) from None


def damaged(path: Path, why: str, *, row: int | None = None) -> InvalidInputError:
    """The error for a label file, or its row counted from 1, that cannot be trusted."""
    place = f"{path}" if row is None else f"row {row} of {path}"
    return InvalidInputError(
        f"{place} is damaged or not of these labels: {why}",
        fix="Copy the file again; or delete it, and let smoothkd labels export write what is then missing.",
    )


def not_of_this_release(path: Path, why: str) -> InvalidInputError:
    """The error for a file that may be whole, but not for this release to read."""
    return InvalidInputError(
        f"{path} was not exported by this release of smoothkd: {why}",
        fix="Export the labels again with this release, to another directory.",
    )


def _options(content: dict[str, Any]) -> LabelOptions:
    known = {field.name for field in fields(LabelOptions)}
    return LabelOptions(**{name: value for name, value in content.items() if name in known})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
