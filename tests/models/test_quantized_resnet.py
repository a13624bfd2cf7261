"""What the conformance table says of `models.quant_resnet`."""

EXEMPT = {
  "quant_resnet": "a ResNet of quantized layers, in the tests of `quantization.layers`",
}
