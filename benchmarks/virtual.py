"""stub"""
def run(args): raise NotImplementedError
