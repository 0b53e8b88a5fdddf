"For whoever waits for a result: the functions of the method, faster, each proven equal to the plain one."
