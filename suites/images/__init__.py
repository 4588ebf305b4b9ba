"""Two sets of pictures: how near are their distributions?"""
