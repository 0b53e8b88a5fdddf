"Images and where they come from: reading and resizing, folders of MVTec AD, TILDA and textures, built-in data, seeds, files."
