"""What the conformance table says of `data.errors`; those who raise the error test it."""

EXEMPT = {
  "MissingDataError": "an exception",
}
