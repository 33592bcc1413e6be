"""The floors that a classifier of images must beat: metadata alone, pixels without a trained network, known patients.

A model may read the view or the age off an image and know from these how likely a finding is; a task may be so easy
that a linear model of a thumbnail solves it; and where images of one patient are in both training and test subset, the
model may recognize the patient instead of the disease. All are measured here on the same labels.
"""

import numpy as np
import pandas as pd

from ..study.labels import list_findings
from ..study.splits import assert_no_patient_overlap, make_split
from .auc import known_together, roc_auc
from .bootstrap import ratio

METADATA_COLUMNS = ("age", "sex", "view", "follow_up")

_MAX_IMAGES = 20_000  # to look for neighbors among, in seconds rather than minutes
_N_NEIGHBORS = 5  # images to look up
_N_COMPONENTS = 100  # of 20 to 200, these separated the patients of an earlier synthetic study best


def predict_without_pixels(train, rows, columns=METADATA_COLUMNS):
    """Predicts the findings from metadata alone; the AUC of these scores is the floor for any model of the images.

    Fits a random forest to all findings at once; findings that are known on other rows get one of their own.
    `columns=("view",)` measures what the projection alone gives away. Age may be NaN. Learned from ChestX-ray14's
    official training and validation patients, the mean AUC on its test list is 0.575 from the view and 0.629 from all
    four columns.

    Args:
        train: DataFrame of rows to learn from, as `load_metadata` gives them, with `patient_id`, `columns` and a column
            of 0, 1 and NaN for each finding.
        rows: DataFrame of rows to score, with `patient_id` and `columns`; its labels are not read.
        columns: names of the columns to learn from; numbers are used as they are, text as categories.

    Returns:
        (rows, findings) float64 probabilities; constant where `train` has fewer than 40 rows, and for a finding of
        which it has no positives; 0 for one of which it knows no label.

    Raises:
        ValueError: if `train` is empty, or a patient is in both, since the follow-ups would give the answer away; names
            the patients.
    """
    from sklearn.ensemble import RandomForestRegressor

    if not len(train):
        raise ValueError("there are no rows to learn from")
    patients = np.concatenate([train["patient_id"], rows["patient_id"]])
    assert_no_patient_overlap(patients, np.repeat(["train", "rows"], [len(train), len(rows)]))
    labels = train[[*list_findings(train)]].to_numpy("float64")
    scores = np.zeros((len(rows), labels.shape[1]))
    inputs, encoded = (_encode(frame, train, columns) for frame in (train, rows))
    for classes, known in known_together(~np.isnan(labels)):
        if known.any() and len(rows):
            target = labels[known][:, classes]
            # On one core: it takes seconds, and threads that wait for a busy core would take minutes.
            forest = RandomForestRegressor(50, min_samples_leaf=max(20, len(target) // 400), random_state=0, n_jobs=1)
            forest.fit(inputs[known], target if len(classes) > 1 else target.ravel())
            scores[:, classes] = forest.predict(encoded).reshape(len(rows), len(classes))
    return scores


def predict_by_ridge(train_features, train_labels, features):
    """Predicts the findings by ridge regression on features that nothing was trained for, such as thumbnails.

    The features are standardized over the training images. The penalty is the best of six by the error of leaving one
    training image out, which has a closed form (generalized cross-validation). Findings that are known on the same
    images share one fit and one penalty.

    Args:
        train_features: float array (n, features) of the images to learn from.
        train_labels: array (n, classes) of 0, 1 and NaN for unknown.
        features: float array (m, features) of the images to score.

    Returns:
        (m, classes) float64 scores, no probabilities; constant where all labels of a class are equal or fewer than 2
        are known.

    Raises:
        ValueError: there are fewer than 2 images to learn from.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(train_features) < 2:
        raise ValueError(f"{len(train_features)} images are too few to learn from")
    train_features, labels = (np.asarray(values, "float32") for values in (train_features, train_labels))
    scores = np.zeros((len(features), labels.shape[1]))
    for classes, known in known_together(~np.isnan(labels)):
        if known.sum() > 1:
            ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 6)))
            ridge.fit(train_features[known], labels[known][:, classes])
            scores[:, classes] = ridge.predict(np.asarray(features, "float32")).reshape(len(features), len(classes))
    return scores


def measure_leakage(thumbnails, rows, seeds=range(5)):
    """Measures how much too good a split by image makes a model look that can only recognize images it has seen.

    The model names the findings of the nearest training images, as far as they are known. Distances are taken between
    whitened principal components of the standardized thumbnails, where what all chests share counts no more than what
    is a patient's own.
    Each seed splits the same images twice, by "random_patients" and by "leaky_images" (see `make_split`), into a fifth
    to test on and the rest to look up. Of more than 20,000, each seed draws whole patients at random. Where
    thumbnails do not tell patients apart, `recognized_by_image` is small and there is nothing to gain.

    Args:
        thumbnails: uint8 array (n, side, side), sides of 16 pixels recognize best; the covariance of more than 64 would
            be a matrix of gigabytes.
        rows: DataFrame of the n images, as `load_metadata` gives them: `image`, `patient_id` and the findings.
        seeds: seeds of the splits, one row of the result each.

    Returns:
        DataFrame, one row a seed: `seed`, `n_images`; `auc_by_patient` and `auc_by_image`, mean test AUC over the
        findings that are defined in both; `flattery`, the second less the first; `known_by_patient` and
        `known_by_image`, the share of test images whose patient has others among the training images, the first being
        0; `recognized_by_image`, the share of those known whose nearest training image is one of the same patient.

    Raises:
        ValueError: if there are too few images or patients to split.
    """
    x = thumbnails.reshape(len(thumbnails), -1).astype("float32")
    x -= x.mean(axis=1, keepdims=True)
    x /= np.maximum(x.std(axis=1, keepdims=True), 1e-6)
    labels, patients = rows[[*list_findings(rows)]].to_numpy("float64"), rows["patient_id"].to_numpy()
    results = []
    for seed in seeds:
        taken = _draw_patients(patients, _MAX_IMAGES, seed)
        few = rows.iloc[taken].reset_index(drop=True)
        by_patient, by_image = (
            _recognize(x[taken], labels[taken], patients[taken], make_split(few, split=s, seed=seed) == "test")
            for s in ("random_patients", "leaky_images")
        )
        both = np.isfinite(by_patient[0]) & np.isfinite(by_image[0])
        aucs = [part[0][both].mean() if both.any() else np.nan for part in (by_patient, by_image)]
        results.append((seed, len(taken), *aucs, aucs[1] - aucs[0], by_patient[1], *by_image[1:]))
    names = "seed n_images auc_by_patient auc_by_image flattery known_by_patient known_by_image recognized_by_image"
    return pd.DataFrame(results, columns=names.split())


def _draw_patients(patients, max_images, seed):
    """Returns the places of all images of patients drawn at random, as many as fit into `max_images`."""
    if len(patients) <= max_images:
        return np.arange(len(patients))
    known, place, n_images = np.unique(patients, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(known))
    drawn = order[np.cumsum(n_images[order]) <= max_images]
    return np.flatnonzero(np.isin(place, drawn))


def _encode(frame, train, columns):
    """Returns (rows, columns) float64: numbers as they are, text as its place among those of `train`, else NaN."""
    encoded = np.empty((len(frame), len(columns)))
    for k, name in enumerate(columns):
        if pd.api.types.is_numeric_dtype(train[name]):
            encoded[:, k] = frame[name]
        else:
            known = {text: place for place, text in enumerate(sorted(train[name].dropna().unique()))}
            encoded[:, k] = frame[name].map(known)
    return encoded


def _recognize(x, labels, patients, in_test):
    """Returns the AUCs of looking up the nearest images, and the shares of test images known and recognized."""
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    n_train = int((~in_test).sum())
    # As many components as images would make all of them equally far from each other.
    n_components = min(_N_COMPONENTS, max(1, n_train // 2), x.shape[1])
    whiten = PCA(n_components, whiten=True, svd_solver="covariance_eigh")
    with np.errstate(invalid="ignore"):  # images without any variance have no shares of it, which nobody reads
        whiten.fit(x[~in_test])
    memory = NearestNeighbors(n_neighbors=min(_N_NEIGHBORS, n_train), algorithm="brute").fit(
        whiten.transform(x[~in_test])
    )
    nearest = memory.kneighbors(whiten.transform(x[in_test]), return_distance=False)
    usual, scores = (
        ratio(np.nansum(values, axis=axis), (~np.isnan(values)).sum(axis=axis))
        for values, axis in ((labels[~in_test], 0), (labels[~in_test][nearest], 1))
    )
    scores = np.nan_to_num(np.where(np.isnan(scores), usual, scores))  # where no neighbor's label is known
    known = np.isin(patients[in_test], patients[~in_test])
    same = patients[~in_test][nearest[:, 0]] == patients[in_test]
    return roc_auc(labels[in_test], scores), known.mean(), same[known].mean() if known.any() else np.nan
