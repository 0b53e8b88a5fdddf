"For whoever goes beyond the paper: calibration with a false-alarm rate, and the hybrid detector, as subclasses."
