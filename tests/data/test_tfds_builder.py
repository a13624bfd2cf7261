"""What the conformance table says of `data.tfds_builder`; the tests of `data.stream` read what it writes."""

EXEMPT = {
  "write_tfds": "writes files",
}
