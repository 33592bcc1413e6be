"""Ways of reading images with PyTorch's DataLoader: torchxrayvision's, torchvision's and albumentations'.

Each takes the folder that `peers.py` prepared and returns batches of (images, labels) without end. Two workers, kept
from epoch to epoch.
"""

import warnings

import numpy as np
import torch
from PIL import Image

SIDE, CROP, BATCH, WORKERS = 256, 224, 64, 2


def _load(images, shuffle=True):
    loader = torch.utils.data.DataLoader(
        images, BATCH, shuffle=shuffle, num_workers=WORKERS, persistent_workers=True, drop_last=True
    )
    while True:
        yield from loader


class _Images(torch.utils.data.Dataset):
    """Images of files or of an array, each read and changed by functions."""

    def __init__(self, source, labels, read, change):
        self.source, self.labels, self.read, self.change = source, labels, read, change

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return self.change(self.read(self.source[row])), self.labels[row]


def _list_files(folder):
    return sorted(str(path) for path in (folder / "images").iterdir()), np.load(folder / "labels.npy")


def _map_array(folder):
    return np.load(folder / "small" / "images.npy", mmap_mode="r"), np.load(folder / "small" / "labels.npy")


def _xrayvision(folder, engine, augmented=True):
    import torchvision
    import torchxrayvision as xrv

    steps = [xrv.datasets.XRayCenterCrop(), xrv.datasets.XRayResizer(CROP, engine=engine)]
    turn = torchvision.transforms.RandomAffine(7, translate=(0.03, 0.03), scale=(1.0, 1.15))
    change = [xrv.datasets.ToPILImage(), turn, torchvision.transforms.RandomHorizontalFlip()]
    images = xrv.datasets.NIH_Dataset(
        imgpath=str(folder / "images"), csvpath=str(folder / "Data_Entry_2017.csv"), views=["*"], unique_patients=False,
        transform=torchvision.transforms.Compose(steps),
        data_aug=torchvision.transforms.Compose([*change, torchvision.transforms.ToTensor()]) if augmented else None,
    )  # fmt: skip
    return ((batch["img"], batch["lab"]) for batch in _load(images, shuffle=augmented))


def xrayvision(folder):
    """`NIH_Dataset` as its authors set it up: scikit-image resizes the image as distributed."""
    return _xrayvision(folder / "files", "skimage")


def xrayvision_cv2(folder):
    """`NIH_Dataset` with OpenCV's resizing, which it offers too."""
    return _xrayvision(folder / "files", "cv2")


def xrayvision_small(folder):
    """`NIH_Dataset` on images shrunk once, as its authors recommend, with OpenCV's resizing."""
    return _xrayvision(folder / "small", "cv2")


def xrayvision_evaluation(folder):
    """`NIH_Dataset` on images shrunk once, to be evaluated."""
    return _xrayvision(folder / "small", "cv2", augmented=False)


def _open(path):
    return Image.open(path).convert("L")


def _torchvision():
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(CROP, scale=(0.75, 1), ratio=(1 / 1.1, 1.1), antialias=True),
            v2.RandomAffine(7, translate=(0.03, 0.03), interpolation=v2.InterpolationMode.BILINEAR),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.1, contrast=0.2),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
        ]
    )


def torchvision_files(folder):
    """A plain `Dataset` with Pillow and torchvision's transforms, on the images as distributed."""
    return _load(_Images(*_list_files(folder / "files"), _open, _torchvision()))


def torchvision_small(folder):
    """The same on an array of images shrunk once, mapped into memory."""
    return _load(_Images(*_map_array(folder), Image.fromarray, _torchvision()))


def _albumentations(resize=None, augmented=True):
    import os

    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask PyPI
    warnings.filterwarnings("ignore", module="albumentations")
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)  # the workers are the parallelism
    steps = [A.Resize(resize, resize, interpolation=cv2.INTER_AREA)] if resize else []
    if augmented:
        steps += [
            A.RandomResizedCrop((CROP, CROP), scale=(0.75, 1), ratio=(1 / 1.1, 1.1)),
            A.Affine(rotate=(-7, 7), translate_percent=(-0.03, 0.03), p=1),
            A.HorizontalFlip(),
            A.RandomBrightnessContrast(0.1, 0.2, p=1),
        ]
    compose = A.Compose(steps)

    def change(image):
        return torch.from_numpy(compose(image=image)["image"][None].astype(np.float32))

    return change


def albumentations_files(folder):
    """The package albumentations in a `Dataset`, OpenCV decodes; on the images as distributed."""
    import cv2

    change = _albumentations(SIDE)
    return _load(_Images(*_list_files(folder / "files"), lambda path: cv2.imread(path, cv2.IMREAD_GRAYSCALE), change))


def albumentations_small(folder):
    """The same on an array of images shrunk once, mapped into memory."""
    return _load(_Images(*_map_array(folder), np.asarray, _albumentations()))


def albumentations_evaluation(folder):
    """The array, resized by OpenCV, to be evaluated."""
    return _load(_Images(*_map_array(folder), np.asarray, _albumentations(CROP, augmented=False)), shuffle=False)
