"""What a method says about the images of a series, in one form, and one code that scores it.

- Images: in the series' window as [0, 1], on the target's grid; where the grid of what is shown (the reference,
  or images in its place) is another, over the voxels that the method draws from within it.
- Contours: the reference's, carried by the method and compared on the target's grid: with the target's own, and
  where the motion is known, with the same contours as it carries them. The target's own are cut into its voxels
  anew, which costs small ones some percent of Dice however well they are followed.
- Landmarks: points of the target, mapped to the reference and compared there, of those that lie in both fields of
  view. Where a method shows a copy of another image, that image's points and contours stand for the target's.
- Folding and the spread of log |J|: over all voxels of the target's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from data import PatientData
from scores import all_reach, contour_scores, everywhere, resampled_labels, within

from stnerp import Grid, InputError
from stnerp.baselines.pair import PairRegistration, registration_of
from stnerp.labels import carried_labels
from stnerp.metrics import dice, folding, jacobian_determinant, psnr_db, ssim, tre_mm
from stnerp.preprocess import normalised

Row = dict[str, float]


@dataclass(frozen=True)
class Answers:
    """What a fitted method says, by the index of an image in the whole series.

    Attributes:
        fitted: how many images were registered to the reference.
        registration: target -> reference on the image's grid; None where there is no answer.
        image: what the image looks like, in the scan's intensities; None where there is no answer, and for a
            whole method the reference warped by `registration`.
        copy_of: the known image that is shown in place of another, with its contours and landmarks.
        drawn_from: the known images that are shown, where they are, in place of the deformed reference.
        rendered: the reference as the method draws it, without what it keeps of the voxels themselves; None
            where it draws the voxels.
        note: what to know about the settings, a line below the table.
    """

    fitted: int = 0
    registration: Callable[[int, Grid], PairRegistration | None] = lambda index, grid: None
    image: Callable[[int, Grid], sitk.Image | None] | None = None
    copy_of: Callable[[int], int] | None = None
    drawn_from: Callable[[int], Sequence[int]] | None = None
    rendered: sitk.Image | None = None
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """What a method says about one image, on that image's grid; all None where it says nothing.

    Attributes:
        image: in the scan's intensities.
        covered: where the image is drawn from within what is shown, (z, y, x); None: everywhere.
        registration: target -> reference.
        labels: carried contours.
        labels_of_motion: the same, carried by the motion itself, where it is known.
        seen: where the image that they come from shows anything, carried in the same way.
        shown: index of the image whose landmarks are found again: the reference's, or that of a copy.
        copied: whether it is a copy, which may be of the reference.
    """

    image: sitk.Image | None
    covered: np.ndarray | None
    registration: PairRegistration | None
    labels: sitk.Image | None
    labels_of_motion: sitk.Image | None
    seen: sitk.Image | None
    shown: int
    copied: bool


def answer(patient: PatientData, answers: Answers, index: int) -> Answer:
    """All that a method says about the image at `index`."""
    series, scan = patient.series, patient.series.images[index]
    grid = Grid.of(scan)
    registration = answers.registration(index, grid)
    shown = None
    if answers.image is not None:
        shown = answers.image(index, grid)
    elif registration is not None:
        shown = registration.image(series.reference_image)
    covered = None
    if registration is not None and not series.grid.is_close(grid):
        shows = sitk.Cast(everywhere(series.reference_image), sitk.sitkFloat32)
        covered = sitk.GetArrayFromImage(registration.warp(shows, outside=0.0)) > 0.5
    elif shown is not None and answers.drawn_from is not None:
        covered = all_reach([series.images[i] for i in answers.drawn_from(index)], scan)
    copy = None if answers.copy_of is None or shown is None else answers.copy_of(index)
    labels = of_motion = seen = None
    if copy is not None and (mask := series.masks[copy]) is not None:
        labels, seen = (resampled_labels(m, scan) for m in (mask, everywhere(series.images[copy])))
    elif registration is not None and (mask := series.masks[series.reference]) is not None:
        labels, seen = (registration.propagate(m) for m in (mask, everywhere(series.reference_image)))
        if (moved := patient.known_motion) is not None:
            start, end = series.times[index], series.reference_time
            of_motion = carried_labels(mask, grid, lambda points_mm: moved(points_mm, start, end))
    landmarks_of = series.reference if copy is None else copy
    return Answer(shown, covered, registration, labels, of_motion, seen, landmarks_of, copied=copy is not None)


def known_registration(patient: PatientData, index: int, grid: Grid) -> PairRegistration:
    """The motion of a stand-in itself: what voxels and noise leave of PSNR and Dice.

    Raises:
        InputError: the data's motion isn't known.
    """
    moved, series = patient.known_motion, patient.series
    if moved is None:
        raise InputError("known_motion: is known of data=tcia_4d_lung_phantom alone; leave it out of methods=")
    return registration_of(grid, lambda p: moved(p, series.times[index], series.reference_time))


def score(patient: PatientData, given: Answer, index: int) -> Row:
    """Scores of the image, the contours and the deformation, by name; empty where there is no answer."""
    series, scan = patient.series, patient.series.images[index]
    row: Row = {}
    if given.image is not None:
        image, target = (normalised(volume, series.window) for volume in (given.image, scan))
        covered = given.covered
        row = {
            "psnr_db": psnr_db(image, target, mask=covered),
            "ssim": ssim(image, target, mask=covered),
            "covered_percent": 100.0 if covered is None else 100 * float(covered.mean()),
        }
    if given.labels is not None:
        row |= contour_scores(patient, index, given.labels, given.seen, source=series.masks[given.shown])
    if given.labels is not None and given.labels_of_motion is not None:
        carried, moved = within(given.seen, given.labels, given.labels_of_motion)
        named = patient.label_names.items()
        row |= {f"motion_dice_{name.replace(' ', '_')}": dice(carried, moved, label) for label, name in named}
    if given.registration is not None:
        row |= folding_of(given.registration.displacement)
    return row


def landmark_errors(patient: PatientData, given: Answer, index: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Errors (N,) in mm, and which landmarks (N,) lie in both fields of view; None without landmarks or answer."""
    series = patient.series
    shown_mm, target_mm = series.landmarks[given.shown], series.landmarks[index]
    if shown_mm is None or target_mm is None or (given.registration is None and not given.copied):
        return None
    grids = Grid.of(series.images[given.shown]), Grid.of(series.images[index])
    seen = grids[0].contains(shown_mm) & grids[1].contains(target_mm)
    found_mm = target_mm if given.registration is None else given.registration.map_points(target_mm)
    return tre_mm(found_mm, shown_mm), seen


def all_scores(patient: PatientData, given: Answer, index: int) -> Row:
    """`score`, and the TRE of the landmarks in both fields of view: mean, median and 95th percentile, mm."""
    row = score(patient, given, index)
    if (measured := landmark_errors(patient, given, index)) is not None:
        errors_mm, seen = measured
        summary = summary_of_errors(errors_mm[seen])
        row |= {f"tre_{name}": summary[name] for name in ("mean_mm", "median_mm", "p95_mm") if name in summary}
    return row


def summary_of_errors(errors_mm: np.ndarray) -> Row:
    """Of landmarks' errors (N,) in mm; empty where there are none."""
    if len(errors_mm) == 0:
        return {}
    return {
        "mean_mm": float(errors_mm.mean()),
        "median_mm": float(np.median(errors_mm)),
        "p95_mm": float(np.percentile(errors_mm, 95)),
        "max_mm": float(errors_mm.max()),
        "points": len(errors_mm),
    }


def folding_of(displacement: sitk.Image) -> Row:
    """`folding` of a displacement's Jacobian."""
    return folding(jacobian_determinant(sitk.GetArrayViewFromImage(displacement), Grid.of(displacement)))
