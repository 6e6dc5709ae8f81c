"""Drop-in modules: the names and signatures of other libraries, on the functions of this one."""
