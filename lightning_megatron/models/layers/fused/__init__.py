"""Operations between the matrix products of a layer, joined into one kernel each by ``torch.compile``."""
