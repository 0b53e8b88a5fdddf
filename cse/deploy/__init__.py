"For whoever puts a detector to work: export to ONNX and OpenVINO, and CSE as a model of anomalib."
