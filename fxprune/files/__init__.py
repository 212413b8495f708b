"""Files: compact models, start values and ONNX, written whole and read safely."""
