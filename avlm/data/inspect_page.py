"""Samples as one HTML page that needs no other file: media as data URIs, learned text in colour."""

import html
from collections.abc import Iterator
from dataclasses import dataclass

from avlm.config.run import DataConfig
from avlm.config.values import counted
from avlm.data.media import signature
from avlm.data.media.browser import audio_uri, image_uri, video_uri
from avlm.data.sample import Sample
from avlm.data.text.pieces import MEDIA

ELEMENTS = {
    "image": '<img src="{uri}" alt="{name}">',
    "audio": '<audio controls src="{uri}"></audio>',
    "video": '<video controls src="{uri}"></video>',
}
URIS = {"image": image_uri, "audio": audio_uri, "video": video_uri}  # of whatever format, as browsers play it
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem; color: #222; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
section { border-top: 1px solid #ddd; padding: 1rem 0; }
h2 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 span, figcaption { color: #777; font-weight: normal; font-size: .85rem; }
figure { display: inline-block; margin: 0 1rem .5rem 0; vertical-align: top; max-width: 100%; }
img { min-height: 5rem; } img, video { max-height: 16rem; max-width: 100%; } audio { max-width: 100%; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .75rem; margin: 0; color: #555; }
.learned { background: #c8f0cf; color: #123; } .media { background: #cfe8f7; color: #123; border-radius: 3px; }
"""


@dataclass(frozen=True)
class Shown:
    """A sample as it is shown. ``pieces``: (modality or "", text, whether it is learned)."""

    sample: Sample
    size: str  # such as "49 tokens, 2 learned"
    pieces: list[tuple[str, str, bool]]
    grids: dict[str, str]  # name of an image or a video -> its size, patches and features


def media_of(sample: Sample) -> Iterator[tuple[str, str, bytes]]:
    """(name such as "image1.png", kind, content) of the media files of a sample."""
    for kind in MEDIA:
        for number, content in enumerate(getattr(sample, f"{kind}s"), start=1):
            yield f"{kind}{number}{signature.ending(content)}", kind, content


def page(shown: list[Shown], title: str, limits: DataConfig) -> str:
    legend = '<span class="learned">learned</span>, <span class="media">features of a tower</span>, other tokens'
    title = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        f"<p>The first {counted(len(shown), 'sample')} as the model sees them: {legend}.</p>\n"
        f"{''.join(_section(each, limits) for each in shown)}</body></html>\n"
    )


def _section(shown: Shown, limits: DataConfig) -> str:
    figures = ""
    for name, kind, content in media_of(shown.sample):
        uri = URIS[kind](content, limits)
        caption = f"{name}: {shown.grids[name]}" if name in shown.grids else name
        figures += f"<figure>{ELEMENTS[kind].format(uri=uri, name=name)}<figcaption>{caption}</figcaption></figure>\n"
    text = "".join(_piece(*piece) for piece in shown.pieces)
    return (
        f"<section><h2>{html.escape(shown.sample.key)} <span>{shown.size}</span></h2>\n"
        f"{figures}<pre>{text}</pre></section>\n"
    )


def _piece(modality: str, text: str, is_learned: bool) -> str:
    text = html.escape(text)
    if modality:
        return f'<span class="media">&lt;{text}&gt;</span>'
    return f'<span class="learned">{text}</span>' if is_learned else text
