"""How a classifier is trained: flags, what they come to, published recipes with their sources."""

import dataclasses
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pretrain.flags import (
    Count,
    Fraction,
    FractionBelowOne,
    NotNegative,
    OptionalCount,
    OptionalSwitch,
    Positive,
    PositiveFraction,
)

if TYPE_CHECKING:  # not imported here: these are flags, and the help of a recipe waits for them
    from torch import nn

    from pretrain.data.transforms import Augment
    from pretrain.spec import InputSpec


@dataclass(frozen=True)
class Changes:
    """Arguments of a model that differ from its family's; None: as the family has them."""

    parts: tuple[str, ...] | None = None
    """Of a --model of two networks, what each is: a name of the table, RUN/backbone, ..."""
    network: str | None = None
    """The 2-D network of a frame family: of timm, torchvision:NAME or open_clip:MODEL/WEIGHTS."""
    attention: str | None = None
    """Blocks to insert: se@sums, nonlocal@*.layer3, ...; see downstream/models/attention.py."""
    frames: OptionalCount = None
    """Frames of a clip."""
    size: OptionalCount = None
    """Height and width of a clip, pixels."""
    width: Positive | None = None
    """Factor on the channels of c3d, i3d and stgcn."""
    subtract_mean: bool | None = None
    """True: subtract each clip's mean frame, which removes static backgrounds."""

    def given(self) -> dict[str, Any]:
        """Those that were given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


ChangesFlags = Annotated[Changes, tyro.conf.arg(name="")]
CHANGES = Changes()


@dataclass(frozen=True)
class Given:
    """The flags of a training; None: as the preset has it, unless the line says otherwise."""

    # Optimisation
    epochs: Positive | None = None
    """Passes over the data; a pass decodes every clip once and sees `views` crops of it."""
    steps: OptionalCount = None
    """Optimizer steps, instead of epochs."""
    batch_size: OptionalCount = None
    """Effective batch: clips in one optimizer step, over all devices and accumulation passes."""
    micro_batch: Count = 32
    """Most clips a device handles at once; the rest is accumulated (batch norm sees only these)."""
    optimizer: Literal["adamw", "sgd"] | None = None
    """adamw, or sgd with momentum 0.9."""
    base_lr: Positive | None = None
    """Learning rate per 256 clips of effective batch."""
    schedule: Literal["cosine", "step"] | None = None
    """cosine to --final-lr, or step: a tenth after each of --drops."""
    final_lr: NotNegative | None = None
    """Where a cosine ends, per 256 clips."""
    drops: tuple[FractionBelowOne, ...] | None = None
    """Fractions of the run after which a step schedule falls to a tenth."""
    warmup: Fraction | None = None
    """Fraction of the steps that warm up."""
    weight_decay: NotNegative | None = None
    """The optimizer's, on matrices and filters only; not on tables of positions."""
    backbone_lr: Positive | None = None
    """Factor on the backbone's rate; 1: as the classifier's."""
    layer_decay: PositiveFraction | None = None
    """Factor on the rate from one layer of the backbone to the one before it; 1: the same rate."""
    smoothing: FractionBelowOne | None = None
    """Fraction of every target spread over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: classes with few videos count more."""
    ema: FractionBelowOne = 0.0
    """Decay of the moving average of the weights, such as 0.999; 0: no average."""
    clip_grad: NotNegative | None = None
    """Largest gradient norm; 0: no clipping."""
    patience: OptionalCount = None
    """Stop after so many validations without a better one; by default never."""

    # The network while it learns
    pool: Literal["mean", "fc_norm", "class"] | None = None
    """fc_norm: of a video transformer, a fresh norm behind the mean of the tokens instead of the
    one before it, as VideoMAE is fine-tuned; by default the backbone's own."""
    head_std: NotNegative | None = None
    """Standard deviation of the classifier's first weights."""
    dropout: FractionBelowOne | None = None
    """Before the classifier."""
    drop_path: FractionBelowOne | None = None
    """Largest probability of leaving out a transformer block."""

    # Augmentation
    sampling: Literal["dense", "uniform"] | None = None
    """dense: frames at a stride; uniform: one of each equal part of a clip (TSN), in training and
    in test; by default the backbone's own."""
    crop: Literal["multi-scale", "resized"] | None = None
    """multi-scale: a box of two of --scales; resized: of 8 to 100 per cent of the area, 3:4 to 4:3
    (RandomResizedCrop)."""
    scales: tuple[PositiveFraction, ...] | None = None
    """Sides of a multi-scale crop, as fractions of the short side."""
    flip: OptionalSwitch = None
    """Mirror half of the clips; --no-flip where classes differ in left and right. Joints alone are
    mirrored only if asked, since people often use the same hand."""
    colour: Fraction | None = None
    """Strength of random brightness, contrast and colour balance, 0 to 1."""
    rand_augment: str | None = None
    """Such as n4-m7: four operations of strength 7 of 10, the same for all frames."""
    erase: Fraction | None = None
    """Fraction of the clips of which one box is erased, in all frames."""
    turn: NotNegative | None = None
    """Of networks of 3-D joints: degrees by which clips are turned about the vertical, at most."""
    affine: Fraction | None = None
    """Of networks of joints: fraction by which axes are scaled and mixed, at most; 0.2 by default
    without a published preset."""
    span: PositiveFraction | None = None
    """Likewise: smallest fraction of a recording's time that a training clip is of, 0.75 by
    default; 1: always the whole."""
    mixup: NotNegative | None = None
    """Alpha of mixup; 0: off."""
    cutmix: NotNegative | None = None
    """Alpha of cutmix; 0: off."""
    views: OptionalCount = None
    """Crops taken from one decode (repeated augmentation); each counts as a clip of the batch."""

    # Test
    num_clips: OptionalCount = None
    """Test views spread over the time of each clip; without a published preset as many as show all
    of most clips, at most 4."""
    num_crops: OptionalCount = None
    """Test views spread over the longer side of each; likewise 3 where pictures are not square."""


TrainingFlags = Annotated[Given, tyro.conf.arg(name="")]
GIVEN = Given()


@dataclass(frozen=True)
class Training(Given):
    """A training of which every value is known; `Given` says what they mean.

    None only says: no number of steps, for ever patient, the backbone's own pooling and sampling,
    no RandAugment. Rates are per 256 clips of batch, as everywhere here: a paper's 0.003 at batch
    30 is 0.0256.
    """

    epochs: float = 30
    batch_size: int = 32
    optimizer: Literal["adamw", "sgd"] = "sgd"
    base_lr: float = 0.01
    schedule: Literal["cosine", "step"] = "step"
    final_lr: float = 0.0
    drops: tuple[float, ...] = (0.25, 0.5, 0.75)
    warmup: float = 0.0
    weight_decay: float = 5e-4
    backbone_lr: float = 1.0
    layer_decay: float = 1.0
    smoothing: float = 0.0
    clip_grad: float = 0.0
    head_std: float = 0.01
    dropout: float = 0.5
    drop_path: float = 0.0
    crop: Literal["multi-scale", "resized"] = "multi-scale"
    scales: tuple[float, ...] = (1.0, 0.93, 0.86, 0.8)
    flip: bool = True
    colour: float = 0.0
    erase: float = 0.0
    turn: float = 0.0
    affine: float = 0.0
    span: float = 1.0
    mixup: float = 0.0
    cutmix: float = 0.0
    views: int = 1
    num_clips: int = 10
    num_crops: int = 1

    def changed(self, given: Given) -> "Training":
        """This training with what was given in place of its own values."""
        values = {name: value for name, value in vars(given).items() if value is not None}
        # A given number of epochs is not to be overruled by steps of ours.
        instead = {"steps": given.steps} if given.epochs else {}
        return replace(self, **values | instead)

    @property
    def augment(self) -> "Augment":
        """What is done to a clip in training, beside its crop and mixing."""
        from pretrain.data.transforms import Augment

        return Augment(
            self.flip, self.colour, self.rand_augment or "", self.erase, turn=self.turn,
            affine=self.affine, span=self.span,
        )  # fmt: skip

    def check(self, spec: "InputSpec", per_frame: bool) -> None:
        """Raise ValueError if clips of this kind, or labels of frames, cannot be trained so.

        Args:
            spec: the backbone's clip.
            per_frame: every frame has a label; else a clip has one.
        """
        self.augment.check(spec)
        mixed = self.mixup or self.cutmix
        if mixed and (joints := spec.streams.keys() - spec.pictures.keys()):
            raise ValueError(
                f"--mixup and --cutmix mix pixels, and this backbone takes {', '.join(joints)}: "
                "give 0 for both"
            )
        if per_frame and (mixed or self.views > 1):
            raise ValueError(
                "--mixup and --cutmix mix whole clips and --views repeats them, not labels of "
                "frames: with --per-frame give 0, 0 and 1"
            )

    def unused_rates(self, backbone: "nn.Module") -> dict[str, str]:
        """Factors on the backbone's rates that --freeze leaves without effect, and why."""
        if hasattr(backbone, "images"):  # what follows its 2-D network learns
            return {}
        factors = {"layer_decay": self.layer_decay, "backbone_lr": self.backbone_lr}
        why = "with --freeze: nothing of this backbone learns"
        return {name: why for name, factor in factors.items() if factor != 1}

    def in_words(self) -> dict[str, str]:
        """Rows of the table at the start: what regularises and what augments."""
        regular = {
            "weight decay": self.weight_decay, "dropout": self.dropout, "drop path": self.drop_path,
            "smoothing": self.smoothing, "average": self.ema, "gradient clip": self.clip_grad,
        }  # fmt: skip
        factors = {"layer decay": self.layer_decay, "backbone's rate": self.backbone_lr}
        regular |= {name: factor for name, factor in factors.items() if factor != 1}
        augment = {
            "colour": self.colour, "erase": self.erase, "turn": self.turn, "affine": self.affine,
            "span": self.span % 1, "mixup": self.mixup, "cutmix": self.cutmix,
        }  # fmt: skip
        resized = self.crop == "resized"
        sides = f"crops {min(self.scales):g} to {max(self.scales):g}"
        named = [
            "crops of 8 to 100 % of the area" if resized else sides,
            "half of them mirrored" if self.flip else "none mirrored",
            f"RandAugment {self.rand_augment}" if self.rand_augment else "",
            *(f"{name} {value:g}" for name, value in augment.items() if value),
            f"{self.views} views" if self.views > 1 else "",
        ]
        return {
            "regularised": ", ".join(f"{name} {v:g}" for name, v in regular.items() if v),
            "augmented": ", ".join(filter(None, named)),
        }


@dataclass(frozen=True)
class Published(Training):
    """A recipe that somebody published.

    Attributes:
        about: a line for the help.
        fits: what `kind_of` says of the backbones it is for.
    """

    about: str = ""
    fits: tuple[str, ...] = ()


# VideoMAE's fine-tuning: FINETUNE.md and scripts/*/finetune.sh of MCG-NJU/VideoMAE (14ef8d8), and
# the defaults of run_class_finetuning.py. Its `--lr` is per 256 videos and each is seen twice
# (num_sample 2, repeated augmentation); here clips count, so rates are halved and batches doubled:
# 5e-4 at 384 videos is 7.5e-4, here 2.5e-4 at 768 clips. Known to differ: its dense training clips
# stretch 16 frames over 64 (spacing 4.27, while its test has 4; here 4 in both), geometry of
# RandAugment is bicubic there and bilinear here, and its erased boxes hold noise of the normalised
# picture.
_VIDEOMAE_B_K400 = Published(
    about="VideoMAE ViT-B on Kinetics-400: 75 epochs, 5 x 3 test views",
    fits=("videomae_b", "videomae_"),
    epochs=75,  # --epochs 75
    batch_size=768,  # --batch_size 6 on 64 GPUs, num_sample 2
    optimizer="adamw",  # --opt adamw, betas 0.9 0.999
    base_lr=2.5e-4,  # --lr 5e-4
    final_lr=5e-7,  # min_lr 1e-6
    schedule="cosine",
    warmup=5 / 75,  # warmup_epochs 5
    weight_decay=0.05,  # --weight_decay 0.05
    layer_decay=0.75,  # layer_decay 0.75
    clip_grad=0.0,  # clip_grad None
    pool="fc_norm",  # use_mean_pooling: fc_norm behind the mean, no norm of the tokens
    head_std=0.02 * 0.001,  # trunc_normal .02, init_scale 0.001
    dropout=0.0,  # fc_drop_rate 0
    drop_path=0.1,  # drop_path 0.1
    sampling="dense",  # kinetics.py; sampling_rate 4 is the backbone's own stride
    crop="resized",  # _aug_frame: RandomResizedCrop, area .08 to 1, aspect 3/4 to 4/3
    flip=True,  # of every data set but SSV2
    colour=0.0,  # color_jitter is not used beside aa
    rand_augment="n4-m7",  # aa rand-m7-n4-mstd0.5-inc1
    erase=0.25,  # reprob 0.25
    smoothing=0.1,  # smoothing 0.1
    mixup=0.8,  # mixup 0.8
    cutmix=1.0,  # cutmix 1.0
    views=2,  # num_sample 2
    num_clips=5,  # --test_num_segment 5
    num_crops=3,  # --test_num_crop 3
)
_VIDEOMAE_B_SSV2 = replace(
    _VIDEOMAE_B_K400,
    about="VideoMAE ViT-B on Something-Something V2: uniform sampling, no flip, 2 x 3 test views",
    epochs=30,  # --epochs 30
    warmup=5 / 30,
    sampling="uniform",  # ssv2.py
    flip=False,  # _aug_frame: random_horizontal_flip False for SSV2
    num_clips=2,  # --test_num_segment 2
)
# Video Swin: configs/recognition/swin/*.py of SwinTransformer/Video-Swin-Transformer (db018fb); 8
# videos on 8 GPUs.
_VIDEO_SWIN_T = Published(
    about="Video Swin T on Kinetics-400, started from ImageNet-1k: 4 x 3 test views",
    fits=("video_swin_t", "video_swin_xs"),
    epochs=30,  # total_epochs 30
    batch_size=64,  # videos_per_gpu 8 on 8 GPUs (section 4.1); update_interval accumulates
    optimizer="adamw",
    base_lr=4e-3,  # lr 1e-3
    schedule="cosine",  # min_lr 0
    warmup=2.5 / 30,  # warmup_iters 2.5 epochs
    weight_decay=0.02,  # none on norms and tables of relative positions
    backbone_lr=0.1,  # lr_mult 0.1
    clip_grad=0.0,  # grad_clip None
    dropout=0.5,  # I3DHead dropout_ratio 0.5; its weights start at .01
    drop_path=0.1,  # drop_path_rate 0.1
    crop="resized",  # RandomResizedCrop with mmaction's defaults, .08 to 1, 3/4 to 4/3
    num_clips=4,  # num_clips 4
    num_crops=3,  # ThreeCrop
)

# As papers and their authors' code train. What neither names is said to be ours. The preset `paper`
# takes the first that fits the backbone.
TRAINING = {
    "videomae_b_k400": _VIDEOMAE_B_K400,
    "videomae_s_k400": replace(
        _VIDEOMAE_B_K400,
        about="VideoMAE ViT-S on Kinetics-400: 150 epochs",
        fits=("videomae_s", "videomae_"),
        epochs=150,  # --epochs 150
        warmup=5 / 150,
        batch_size=768,  # --batch_size 12 on 32 GPUs, num_sample 2
    ),
    "videomae_l_k400": replace(
        _VIDEOMAE_B_K400,
        about="VideoMAE ViT-L on Kinetics-400: 35 epochs",
        fits=("videomae_l", "videomae_"),
        epochs=35,  # --epochs 35
        warmup=5 / 35,
        batch_size=256,  # --batch_size 2 on 64 GPUs, num_sample 2
        base_lr=1e-3,  # --lr 2e-3
    ),
    "videomae_h_k400": replace(
        _VIDEOMAE_B_K400,
        about="VideoMAE ViT-H on Kinetics-400: 50 epochs, more dropout",
        fits=("videomae_h", "videomae_"),
        epochs=50,  # --epochs 50
        warmup=5 / 50,
        batch_size=1024,  # --batch_size 8 on 64 GPUs, num_sample 2
        base_lr=5e-4,  # --lr 1e-3
        final_lr=5e-6,  # --min_lr 1e-5
        drop_path=0.2,  # --drop_path 0.2
        dropout=0.5,  # --fc_drop_rate 0.5
    ),
    "videomae_b_ssv2": _VIDEOMAE_B_SSV2,
    "videomae_s_ssv2": replace(
        _VIDEOMAE_B_SSV2,
        about="VideoMAE ViT-S on Something-Something V2: 40 epochs",
        fits=("videomae_s", "videomae_"),
        epochs=40,  # --epochs 40
        warmup=5 / 40,
        base_lr=5e-4,  # --lr 1e-3, at 12 videos on 32 GPUs
        layer_decay=0.7,  # --layer_decay 0.7
    ),
    "videomae_b_ucf101": replace(
        _VIDEOMAE_B_K400,
        about="VideoMAE ViT-B on UCF101: 100 epochs on 8 GPUs, more dropout",
        epochs=100,  # --epochs 100
        warmup=5 / 100,
        batch_size=256,  # --batch_size 16 on 8 GPUs, num_sample 2
        final_lr=5e-6,  # --min_lr 1e-5
        layer_decay=0.7,  # --layer_decay 0.7
        drop_path=0.2,  # --drop_path 0.2
        dropout=0.5,  # --fc_drop_rate 0.5
    ),
    "video_swin_t_k400": _VIDEO_SWIN_T,
    "video_swin_s_k400": replace(
        _VIDEO_SWIN_T,
        about="Video Swin S on Kinetics-400, started from ImageNet-1k",
        fits=("video_swin_s", "video_swin_xs"),
        drop_path=0.1,  # drop_path_rate 0.1 (the paper says 0.2)
    ),
    "video_swin_b_k400": replace(
        _VIDEO_SWIN_T,
        about="Video Swin B on Kinetics-400, started from ImageNet-1k",
        fits=("video_swin_b", "video_swin_xs"),
        drop_path=0.3,  # drop_path_rate 0.3
        weight_decay=0.05,  # weight_decay 0.05
    ),
    "video_swin_b_k400_22k": replace(
        _VIDEO_SWIN_T,
        about="Video Swin B on Kinetics-400, started from ImageNet-22k",
        # No configuration of L was published.
        fits=("video_swin_b", "video_swin_l", "video_swin_xs"),
        base_lr=1.2e-3,  # lr 3e-4
        drop_path=0.2,  # drop_path_rate 0.2
        weight_decay=0.05,  # weight_decay 0.05
    ),
    # Arnab et al. 2021, table 7, and vivit/configs/kinetics400/vivit_base_k400.py of
    # google-research/scenic (4a38d47).
    "vivit_b_k400": Published(
        about="ViViT on Kinetics-400, started from an image ViT: 4 x 3 test views",
        fits=("vivit",),
        epochs=30,  # num_training_epochs 30
        batch_size=64,  # batch_size 64
        optimizer="sgd",  # momentum 0.9
        base_lr=0.4,  # base_learning_rate 1e-1
        schedule="cosine",
        warmup=2.5 / 30,  # warmup_steps 2.5 epochs
        weight_decay=0.0,  # l2_decay_factor 0
        clip_grad=1.0,  # max_grad_norm 1
        head_std=0.0,  # the output projection starts at zero
        dropout=0.0,  # dropout_rate 0
        scales=(0.97, 0.89, 0.82, 0.74, 0.66),  # 224 of sides of 256 x 0.9 to 1.33
        colour=0.4,  # there in four clips of five, with hue, and one clip of ten grey
        num_clips=4,  # num_test_clips 4
        num_crops=3,  # do_three_spatial_crops
    ),
    # Wang et al. 2016 (arXiv:1608.00859), the RGB network: SGD, momentum 0.9, batch 256, 1e-3, a
    # tenth of it at 2000 and 4000 of 4500 steps, which are 121 epochs of UCF101; dropout 0.8,
    # corner crops of 1, .875, .75, .66. Three segments there (--frames 3); 25 frames are tested in
    # ten crops there, here 8 views of the frames of the model.
    "tsn_ucf101": Published(
        about="TSN, the RGB network, on UCF101: frames of equal parts of the video, averaged",
        fits=("frame_mean",),
        epochs=121, batch_size=256, base_lr=1e-3, drops=(2000 / 4500, 4000 / 4500),
        weight_decay=5e-4, dropout=0.8, sampling="uniform",
        scales=(1.0, 0.875, 0.75, 0.66), num_clips=8,
    ),
    # Karpathy et al. 2014: SGD, momentum 0.9, weight decay 5e-4, batch 32, rate 1e-3 lowered when
    # validation stalls; crops of 170 of 200 pixels, flips; 20 clips tested. The epochs and when the
    # rate falls are ours.
    "karpathy_sports1m": Published(
        about="Karpathy et al., single frame, late, early and slow fusion, on Sports-1M: 20 clips",
        fits=("frame_single", "fusion", "frame_mean"),
        epochs=30, batch_size=32, base_lr=0.008, scales=(0.85,), num_clips=20,
    ),
    # Simonyan & Zisserman 2014 (arXiv:1406.2199), the spatial network fine-tuned on UCF101: SGD,
    # momentum 0.9, batch 256, 1e-2, a tenth of it at 14000 of 20000 steps, which are 537 epochs;
    # dropout 0.9; 224 of 256 pixels, flips, colour; 25 frames tested in ten crops. The strength of
    # colour is ours, weight decay that of the net it starts from.
    "two_stream_ucf101": Published(
        about="two-stream network, the spatial one, on UCF101: single frames, 25 test frames",
        fits=("frame_single",),
        epochs=537, batch_size=256, base_lr=0.01, drops=(0.7,), weight_decay=5e-4, dropout=0.9,
        scales=(0.875,), colour=0.1, num_clips=25,
    ),
    # The same, the temporal network, from scratch on flow: batch 256, 1e-2, a tenth of it at 50000
    # and 70000 of 80000 steps, which are 2147 epochs; dropout 0.9. The spatial network is trained
    # beside it here, where both are one.
    "two_stream_flow_ucf101": Published(
        about="two-stream network, the temporal one (or both as one), on UCF101: 25 test stacks",
        fits=("flow_stack", "two_stream"),
        epochs=2147, batch_size=256, base_lr=0.01, drops=(5 / 8, 7 / 8), weight_decay=5e-4,
        dropout=0.9, scales=(0.875,), num_clips=25,
    ),
    # Wang et al. 2016 (arXiv:1608.00859), the flow network, started from ImageNet: 5e-3, a tenth of
    # it at 12000 and 18000 of 20000 steps, which are 537 epochs; dropout 0.7, corner crops.
    "tsn_flow_ucf101": Published(
        about="TSN's training of the temporal network, started from ImageNet, on UCF101",
        fits=("flow_stack",),
        epochs=537, batch_size=256, base_lr=5e-3, drops=(0.6, 0.9), weight_decay=5e-4, dropout=0.7,
        scales=(1.0, 0.875, 0.75, 0.66), num_clips=25,
    ),
    # Yan et al. 2018, config/st_gcn/ntu-xsub/train.yaml of yysijie/st-gcn: SGD, momentum 0.9, batch
    # 64, 0.1, a tenth of it after 10 and 50 of 80 epochs; weight decay 1e-4, dropout 0.5 in the
    # blocks and none before the classifier, no augmentation. Clips are tested whole.
    "stgcn_ntu": Published(
        about="ST-GCN on NTU RGB+D, cross-subject: 80 epochs",
        fits=("stgcn",),
        epochs=80, batch_size=64, base_lr=0.4, drops=(1 / 8, 5 / 8), weight_decay=1e-4, dropout=0.0,
        scales=(1.0,), flip=False, num_clips=1,
    ),
    # Das et al. 2019, and lstm_train_skeleton.py of srijandas07/LSTM_action_recognition: Adam, 5e-3
    # at batch 200, 30 epochs, gradients clipped at 1, dropout 0.5 behind the LSTM.
    "lstm_ntu": Published(
        about="three LSTMs on the joints of NTU RGB+D, as the attention of Das et al. needs them",
        fits=("skeleton_lstm",),
        epochs=30, batch_size=200, optimizer="adamw", base_lr=6.4e-3, drops=(), weight_decay=0.0,
        clip_grad=1.0, dropout=0.5, scales=(1.0,), flip=False, num_clips=1,
    ),
    # Das et al. 2019: both networks trained before (--parts I3D_RUN/backbone LSTM_RUN/backbone),
    # then together: Adam at 1e-3, as in lstm_train_attention.py of their srijandas07/P-I3D and, in
    # a comment, in DAIGroup/separable_STA, which itself takes 1e-5; 30 epochs and a dropout of .5
    # as in their own code of this network, which has SGD, momentum .9, .01, and batches of 4.
    # Batches of 16 are ours.
    "sta_smarthome": Published(
        about="pose-driven attention on Toyota Smarthome: give --parts of trained networks",
        fits=("pose_attention",),
        epochs=30, batch_size=16, optimizer="adamw", base_lr=0.016, drops=(), weight_decay=0.0,
        dropout=0.5, scales=(0.875,), num_clips=1,
    ),
    # Donahue et al. 2015, and lstm_solver_RGB.prototxt of LisaAnne/lisa-caffe-public: SGD, momentum
    # 0.9, 24 videos of 16 frames, 1e-3, a tenth of it at 10000 and 20000 of 30000 steps, which are
    # 75 epochs of UCF101; weight decay 5e-3, gradients clipped at 5, dropout 0.5 behind the LSTM;
    # 227 of 240 pixels, flips. Its test averages clips 8 frames apart.
    "lrcn_ucf101": Published(
        about="LRCN on UCF101: a recurrent network on a 2-D one",
        fits=("recurrent",),
        epochs=75, batch_size=24, base_lr=0.0107, drops=(1 / 3, 2 / 3), weight_decay=5e-3,
        clip_grad=5.0, scales=(0.946,),
    ),
    # Lea et al. 2017, and TCN_main.py and tf_models.py of colincsl/TemporalConvolutionalNetworks:
    # 200 epochs, batch 8, RMSprop at Keras' 1e-3 (here AdamW), dropout inside the network. They
    # train on features, not on frames.
    "ed_tcn_50salads": Published(
        about="ED-TCN on 50 Salads: give --per-frame",
        fits=("ed_tcn",),
        epochs=200, batch_size=8, optimizer="adamw", base_lr=0.032, schedule="step", drops=(),
        weight_decay=0.0, dropout=0.0,
    ),
    # Bai et al. 2018 train on sequences of other things: Adam at 1e-3 to 4e-3, gradients clipped,
    # dropout inside the blocks. Epochs, batch and the cosine are ours.
    "tcn": Published(
        about="TCN as Bai et al. train it on sequences",
        fits=("tcn", "ed_tcn"),
        epochs=30, batch_size=32, optimizer="adamw", base_lr=8e-3, schedule="cosine",
        weight_decay=0.0, dropout=0.0, clip_grad=0.4,
    ),
    # Tran et al. 2015, C3D on UCF101 from scratch: batch 30, rate 0.003 divided by 10 every 4
    # epochs, 16 epochs; 112 of 128 pixels, flips; ten clips tested. Dropout and weight decay are
    # those of the released network.
    "c3d_ucf101": Published(
        about="C3D on UCF101, from scratch: 16 epochs, 10 test clips",
        fits=("c3d",),
        epochs=16, batch_size=30, base_lr=0.0256, drops=(0.25, 0.5, 0.75), scales=(0.875,),
    ),
    # Carreira & Zisserman 2017: SGD, momentum 0.9, the rate falls tenfold when validation stalls;
    # 224 of 256 pixels, flips; dropout 0.5 and weight decay 1e-7 of the released code. Epochs,
    # batch and rate are ours.
    "i3d_k400": Published(
        about="I3D on Kinetics-400, started from ImageNet",
        fits=("i3d", "inflated", "s3d", "feature_fusion"),
        epochs=40, batch_size=64, base_lr=0.1, weight_decay=1e-7, scales=(0.875,),
    ),
    # Wang et al. 2018, section 4.1: SGD, momentum 0.9, weight decay 1e-4, 8 clips on 8 GPUs, 0.01,
    # a tenth of it at 150000 and 300000 of 400000 steps, which are 104 epochs of Kinetics; dropout
    # 0.5; 224 of sides of 256 to 320, flips; 10 x 3 views.
    "nonlocal_k400": Published(
        about="inflated and non-local ResNets on Kinetics-400: 104 epochs, 10 x 3 test views",
        fits=("nonlocal", "inflated"),
        epochs=104, batch_size=64, base_lr=0.04, drops=(0.375, 0.75), weight_decay=1e-4,
        scales=(0.875, 0.78, 0.7), num_crops=3,
    ),
    # Tran et al. 2018: batch 32 a GPU, rate 0.01, 10 of 45 epochs of warm-up, then a tenth every 10
    # epochs; 112 of 128 pixels; ten clips tested. No dropout; weight decay is ours.
    "r2plus1d_k400": Published(
        about="R(2+1)D, R3D and MC3 on Kinetics-400: 45 epochs, 10 test clips",
        fits=("r3d",),
        epochs=45, batch_size=32, base_lr=0.08, warmup=10 / 45, drops=(20 / 45, 30 / 45, 40 / 45),
        weight_decay=1e-4, dropout=0.0, scales=(0.875,),
    ),
}  # fmt: skip


# Minutes on two cores, for any family and however few the clips: what a small network learns
# soonest with. Nothing published.
TINY_TRAINING = Training(
    steps=300, epochs=0, optimizer="adamw", base_lr=0.016, schedule="cosine", warmup=0.1,
    weight_decay=0.05, dropout=0.2, smoothing=0.1, clip_grad=1.0, colour=0.4, num_clips=1,
)  # fmt: skip
# An encoder that has learned already is moved less.
TINY_BACKBONE = replace(TINY_TRAINING, base_lr=0.008, layer_decay=0.75)


def flags_of(training: Training) -> Given:
    """A training as if every value of it had been given; no epochs where it counts steps."""
    values = {f.name: getattr(training, f.name) for f in dataclasses.fields(Given)}
    return Given(**values | ({"epochs": None} if training.steps else {}))


def kind_of(backbone: "nn.Module") -> str:
    """The key of a backbone in `TRAINING`: its family, and its size where recipes differ by it."""
    return getattr(backbone, "kind", type(backbone).__name__)


def fitting(backbone: "nn.Module") -> list[str]:
    """The recipes of `TRAINING` for a backbone, the one closest to it first.

    Raises:
        ValueError: there is none.
    """
    kind = kind_of(backbone)
    found = [name for name, published in TRAINING.items() if kind in published.fits]
    if not found:
        raise ValueError(
            f"no recipe is published for {type(backbone).__name__}: take the preset tiny"
        )
    return found


def resolve_training(
    preset: str, given: Given, backbone: "nn.Module", name: str, fresh: bool
) -> Training:
    """The training that a preset and flags come to for a backbone.

    Args:
        preset: a name in `TRAINING`; "paper", the first of them that fits; or else the small one.
        given: the flags, those of the preset among them.
        backbone: what is trained.
        name: as the user called it.
        fresh: it has learned nothing yet.

    Raises:
        ValueError: the preset is another backbone's, none fits, or there is no such optimizer.
    """
    if preset == "paper":
        preset = fitting(backbone)[0]
    elif preset in TRAINING and preset not in (fits := fitting(backbone)):
        raise ValueError(
            f"the preset {preset} is not for {name} ({kind_of(backbone)}): take {', '.join(fits)} "
            "or tiny"
        )
    small = TINY_TRAINING if fresh else TINY_BACKBONE
    from pretrain.spec import Backbone

    assert isinstance(backbone, Backbone)
    spec = backbone.input_spec
    if "rgb" not in spec.streams:
        small = replace(small, colour=0.0)  # flow and joints have none
    if not spec.pictures:
        small = replace(small, flip=False, affine=0.2, span=1.0 if spec.stride else 0.75)
    training = TRAINING.get(preset, small).changed(given)
    if training.optimizer not in ("adamw", "sgd"):
        raise ValueError(f"--optimizer {training.optimizer!r} is neither adamw nor sgd")
    return training
