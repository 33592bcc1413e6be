"""Progress bars for the tests."""


class Bars:
    """Stands for `tqdm`: the bars it `made` know their `options`, how far they came and whether they are `closed`."""

    def __init__(self):
        self.made = []

    def __call__(self, **options):
        self.made.append(_Bar(options))
        return self.made[-1]


class _Bar:
    def __init__(self, options):
        self.options, self.at, self.closed = options, options.get("initial", 0), False

    def update(self, n):
        assert not self.closed
        self.at += n

    def close(self):
        self.closed = True
