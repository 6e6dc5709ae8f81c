"""The thresholds of Gaussian splatting, those of gsplat 1.5.3 (the same numbers: csrc/splatting/constants.h)."""

ALPHA_MAX = 0.999  # an alpha above is cut to this, and has no gradient to what it was computed from
ALPHA_MIN = 1 / 255  # an alpha below is not drawn
TRANSMITTANCE_MIN = 1e-4  # a pixel ends in front of the Gaussian that would leave it this transmittance or less
EXTENT = 3.33  # standard deviations at which a Gaussian ends at the latest: sqrt(2 ln 255) rounded up
CLAMP_MARGIN = 0.3  # the projection's Jacobian is taken at most this much of tan(half the view) outside the image
