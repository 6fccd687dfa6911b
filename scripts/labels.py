"""What tables and figures call the methods."""

LABELS = {
    "no_motion": "no motion",
    "known_motion": "known motion",
    "nearest_image": "nearest image",
    "nearest_phase": "nearest phase",
    "linear_blend": "linear blend",
    # The prior is Ref-Net, as in the paper's tables.
    "stnerp_fast": "stnerp fast, w/o prior",
    "stnerp_fast_prior": "stnerp fast, with prior",
    "stnerp_fast_without_t": "stnerp fast, with prior, w/o t",
    "stnerp_fast_blend": "stnerp fast, w/o prior, appearance blend",
    "stnerp_paper": "stnerp paper, with prior",
    "stnerp_paper_without_prior": "stnerp paper, w/o prior",
    "stnerp_paper_without_t": "stnerp paper, with prior, w/o t",
    "ants_syn": "ANTs SyN",
    "elastix_bspline": "elastix B-spline",
    "greedy": "greedy",
    "convexadam": "ConvexAdam",
    "dlir": "DLIR",
    "anatomy_cnn": "CNN with anatomical constraints",
    "idir": "IDIR",
    "cycle_idir": "cycle-consistent IDIR",
}
