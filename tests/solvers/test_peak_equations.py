"""What the conformance table says of `solvers.peak_equations`."""

EXEMPT = {
  "PeakEquation": "functions of a problem",
  "cubic_peak_equation": "makes functions; the tests of adaptive sampling check them",
  "poisson_peak_equation": "makes functions; the tests of adaptive sampling check them",
  "two_peaks_equation": "makes functions; the tests of adaptive sampling check them",
}
