"""Options that several commands share."""

from __future__ import annotations

from tiler.request.choices import parse_format
from tiler.request.loras import parse_lora
from tiler.request.options import Option, Panel

OUTPUT = Option(
    "The picture to write: .png, .jpg, .pdf, .tif, .webp or .avif; - is standard output, for a pipe. WebP and AVIF "
    "need memory for the whole picture.",
    Panel.OUTPUT, ("--output", "-o"), default="tiler.png",
)  # fmt: skip
FORMAT = Option(
    "The picture's format on standard output: png, jpeg, pdf, webp or avif.",
    Panel.OUTPUT, ("--format",), parse=parse_format, metavar="NAME", default="png",
)  # fmt: skip
QUALITY = Option(
    "Quality of a JPEG, WebP or AVIF, 1–100; from 90 on, JPEG and AVIF store colours at full resolution.",
    Panel.OUTPUT, ("--quality",), metavar="N", default="90",
)  # fmt: skip
MODEL = Option(
    "`mini`, a folder in diffusers layout, a single .safetensors or .gguf file, the name of one in --model-dir, or a "
    "hub id like org/name.",
    Panel.MODEL, ("--model", "-m"),
)  # fmt: skip
VARIANT = Option(
    "Flavour of the weight files, as in NAME.fp16.safetensors.",
    Panel.MODEL, ("--variant",), default="fp16 if there is one, else plain",
)  # fmt: skip
REVISION = Option("Branch, tag or commit of a hub id.", Panel.MODEL, ("--revision",))
CACHE_DIR = Option("Folder for int8 weights.", Panel.MEMORY, ("--cache-dir",), default="~/.cache/tiler/packed")
RENDER_CACHE_DIR = CACHE_DIR._replace(
    help="Folder for int8 weights and encoded prompts, which later renders use again.",
    default="~/.cache/tiler",
)
EMPHASIS = Option(
    "What weights like (word:1.3) do. original: as in A1111; no-norm: encodings are scaled, but not brought back to "
    "their mean; ignore: nothing; none: brackets are plain text.",
    Panel.PICTURE, ("--emphasis",),
)  # fmt: skip
EMBD_DIR = Option(
    "Folder of embeddings (textual inversion, .safetensors), which prompts name by file name, embedding:NAME or "
    "<NAME>; for SD 1.x, 2.x and SDXL.",
    Panel.MODEL, ("--embd-dir",), metavar="FOLDER",
)  # fmt: skip
LORA = Option(
    "A LoRA, LoCon, LoHa, LoKr or DoRA (.safetensors), or its name in the lora_dirs; may be given several times. "
    "FILE=0.8 sets its strength; FILE=0.8:0.5 sets 0.5 for the text encoders.",
    Panel.MODEL, ("--lora",), parse=parse_lora, metavar="FILE[=M]", many=True,
)  # fmt: skip
LORA_DIR = Option(
    "Folder of the LoRAs that the prompt names as in A1111: <lora:NAME:0.8>.",
    Panel.MODEL, ("--lora-dir",), metavar="FOLDER",
)  # fmt: skip
CLIP_SKIP = Option(
    "Use the output of CLIP's last layer (1), of the one before it (2), and so on; for SD 1.x and 2.x.",
    Panel.SAMPLING, ("--clip-skip",), metavar="N", default="1",
)  # fmt: skip
DECODE = Option(
    "How latents become a picture. exact: the whole picture, layer by layer through scratch files; sampled: like exact, but "
    "attention sees at most 16,384 evenly spaced tokens; frozen: row by row with statistics measured beforehand, for any size "
    "and little disk space; tiny: a fast approximation by --tiny-vae; auto: exact while attention to the whole picture is a "
    "small part of the work, then sampled, and frozen above a width of 4,096 px or if disk space is short.",
    Panel.MEMORY,
    ("--decode",),
)
DECODE_PRECISION = Option(
    "Arithmetic of the autoencoder. bf16 takes two thirds of fp32's time where `tiler doctor` offers it, "
    "and keeps more than 50 dB PSNR; auto is bf16 beside a denoiser in int8 or bf16, else fp32.",
    Panel.MEMORY, ("--decode-precision",),
)  # fmt: skip
SCRATCH = Option("Folder for the decoder's scratch files.", Panel.MEMORY, ("--scratch",), default="the output's folder")
SCRATCH_DTYPE = Option(
    "How scratch files store activations; fp16 takes half the bytes and keeps about 70 dB PSNR.",
    Panel.MEMORY, ("--scratch-dtype",),
)  # fmt: skip
TINY_VAE = Option(
    "An AutoencoderTiny for --decode tiny or --preview: a folder, a TAESD file, or a hub id like madebyollin/taesd.",
    Panel.MODEL,
    ("--tiny-vae",),
)
WRAP = Option(
    "Make a picture whose copies join without a seam: side by side (x), stacked (y), or both (xy).",
    Panel.PICTURE, ("--wrap",),
)  # fmt: skip
DPI = Option("Pixels per inch, stored in the file.", Panel.PICTURE, ("--dpi",), default="300 with --paper")
PREVIEW = Option(
    "A rough look at the canvas while it is denoised, up to 512 pixels across: this .png or .jpg is rewritten after "
    "each step, or, if FILE is -, each preview is printed in the terminal below the last one. --tiny-vae gives a "
    "better one.",
    Panel.OUTPUT, ("--preview",), metavar="FILE",
)  # fmt: skip
PREVIEW_INTERVAL = Option(
    "Steps between previews; more if previews would take more than 1 % of the time.",
    Panel.OUTPUT, ("--preview-interval",), metavar="N",
)  # fmt: skip
METADATA = Option("Write no prompt, seed or settings into the file.", Panel.OUTPUT, ("--no-metadata",), off=True)
FORCE = Option("Replace existing output files.", Panel.OUTPUT, ("--force", "-f"))
RESTART = Option("Start over instead of continuing an interrupted job of this picture.", Panel.OUTPUT, ("--restart",))
KEEP_JOB = Option("Keep the job's folder when the picture is finished.", Panel.OUTPUT, ("--keep-job",))
JOB_DIR = Option(
    "Folder for the jobs of interrupted runs.", Panel.OUTPUT, ("--job-dir",), default="beside the output"
)  # fmt: skip
SCALE = Option(
    "Enlarge the picture of --guide X times; the canvas takes its size from it.", Panel.PICTURE, ("--scale",)
)  # fmt: skip
GUIDE_SHARPEN = Option(
    "Sharpen the guide, also a picture of --guide, by an unsharp mask of 0–500 percent before it is enlarged as a "
    "picture: refining keeps edges as soft as it finds them.",
    Panel.SAMPLING, ("--guide-sharpen",), metavar="PERCENT", default="the model's, mostly 0",
)  # fmt: skip
REPAINT = Option(
    "Repaint the part of --guide's picture that is white in MASK, a picture of the same shape, and keep every other "
    "pixel; only tiles under the mask are denoised.",
    Panel.PICTURE, ("--repaint",), metavar="MASK",
)  # fmt: skip
KEYS = Option(
    "Folder with the pair of keys that every machine of a cluster has; `tiler cluster keys FOLDER` makes it.",
    Panel.CLUSTER, ("--keys",), metavar="FOLDER",
)  # fmt: skip
INSECURE = Option(
    "Let a cluster work without keys: anyone who reaches its ports can run code on each of its machines.",
    Panel.CLUSTER, ("--insecure",),
)  # fmt: skip
