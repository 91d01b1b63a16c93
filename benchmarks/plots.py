def draw(about, rows, folder):
    raise NotImplementedError
