// The thresholds of Gaussian splatting, those of gsplat 1.5.3 (the same numbers: mpkernels/splatting/constants.py).
#pragma once

namespace mpkernels {
namespace splatting {

// an alpha above is cut to this, and has no gradient to what it was computed from
template <typename T>
constexpr T alpha_max = T(0.999);
// an alpha below is not drawn
template <typename T>
constexpr T alpha_min = T(1) / T(255);
// a pixel ends in front of the Gaussian that would leave it this transmittance or less
template <typename T>
constexpr T transmittance_min = T(1e-4);
// standard deviations at which a Gaussian ends at the latest: sqrt(2 ln 255) rounded up
template <typename T>
constexpr T extent = T(3.33);
// the projection's Jacobian is taken at most this much of tan(half the view) outside the image
template <typename T>
constexpr T clamp_margin = T(0.3);

}  // namespace splatting
}  // namespace mpkernels
