"""Weights of a slide encoder that was trained here, in the layout in which slide encoders are published."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from ...data.whole_file import write_whole
from ...errors import LongslideError


@dataclass(frozen=True)
class ExportedEncoder:
    """What `export` wrote of a checkpoint.

    Attributes:
        weights: The weights file.
        spec: The YAML file that describes the slide encoder, for `--slide-encoder`.
    """

    weights: Path
    spec: Path

    @property
    def ok(self) -> bool:
        """True: what cannot be exported is an error."""
        return True


def export_slide_encoder(checkpoint: Path, output: Path, name: str | None = None) -> ExportedEncoder:
    """Write the slide encoder of a checkpoint in the published layout, `{"model": state_dict}`.

    Beside it goes a YAML file of its size, so that `embed` takes the two with --slide-encoder and --slide-checkpoint.

    Args:
        checkpoint: A checkpoint of `longslide fit`: of the masked autoencoder, or of a classifier with a slide encoder.
        output: The file to write, such as `slide_encoder.pth`; the YAML file has the same name with `.yaml`.
        name: The slide encoder's name, recorded in feature files. Default: the stem of `output`.

    Raises:
        LongslideError: The checkpoint has no slide encoder, or the files cannot be written.
    """
    import io

    import torch

    from ...models.aggregators.slide_encoder import SlideEncoderAggregator
    from ...models.checkpoint_file import read_description
    from ...models.classifier.checkpoint import load_classifier
    from ...models.slide_encoder.base import read_pretrained
    from ...models.slide_encoder.checkpoint import to_published
    from ...models.slide_encoder.encoder import SlideEncoder
    from ...models.slide_encoder.spec import list_slide_encoders, load_slide_encoder_spec

    name = output.stem if name is None else name
    if name in list_slide_encoders():
        raise LongslideError(f"the name {name!r} is taken by a slide encoder of the package; give another --name")
    description = read_description(checkpoint)
    if description is not None and description.get("kind") == "mae":
        encoder = read_pretrained(checkpoint)
    else:
        aggregator = load_classifier(checkpoint).aggregator
        if not isinstance(aggregator, SlideEncoderAggregator) or not isinstance(aggregator.encoder, SlideEncoder):
            raise LongslideError(
                f"{checkpoint}: a classifier without slide encoder of GigaPath's architecture "
                f"({type(aggregator).__name__}); there is none to export"
            )
        encoder = aggregator.encoder
    state = {key: value.detach().clone() for key, value in to_published(encoder).items()}
    # Layers after the last one that a classifier uses are cut off.
    spec = replace(encoder.spec, name=name, hub_id=None, hub_file=None, layers=len(encoder.layers), dropout=0.0)
    stream = io.BytesIO()
    torch.save({"model": state}, stream)
    exported = ExportedEncoder(output, output.with_suffix(".yaml"))
    if exported.spec.is_file():
        try:
            load_slide_encoder_spec(str(exported.spec))
        except LongslideError as error:
            raise LongslideError(
                f"{exported.spec} is there already, and is no slide encoder; give another --output"
            ) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(exported.weights, stream.getbuffer(), "--output")
    content = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(spec).items()}
    write_whole(exported.spec, yaml.safe_dump(content, sort_keys=False).encode(), "--output")
    print(f"use it by --slide-encoder {exported.spec} --slide-checkpoint {exported.weights}")
    return exported
