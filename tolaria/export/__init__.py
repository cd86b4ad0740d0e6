"""The trained model, grown parts and all, in a form that needs no Tolaria.

grown        the model as the checkpoint has it, built by the code that trained it
blueprints   the source of what grew, cut out of where it stands
plain        weights, structure, and a model.py of torch alone that puts them together
program      one torch.export program
"""
