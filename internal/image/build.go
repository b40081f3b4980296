package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// Build makes one of the built-in images and gives it a name, the recipe's if
// name is "". Without force an image that the same recipe made of the same
// suite is taken instead of making one. Two calls for the same recipe are one
// build. A failed or cancelled build leaves nothing. The faults are invalid
// (no such recipe), missing (a program of the host), unavailable (its package
// archives), unsupported and no_space.
func (s *Store) Build(ctx context.Context, recipeName, name string, force bool, p domain.ProgressFunc) (domain.Image, error) {
	r, ok := recipes[recipeName]
	if !ok {
		return domain.Image{}, fault.New(fault.Invalid, "no recipe %q", recipeName).
			WithNext("The recipes are %s; `agentiso image pull` fetches other images.", strings.Join(Recipes(), ", "))
	}
	name = cmp.Or(name, recipeName)
	if err := checkName(name); err != nil {
		return domain.Image{}, err
	}
	if more := s.o.RecipeFiles[recipeName]; more != nil {
		files, err := more()
		if err != nil {
			return domain.Image{}, fmt.Errorf("build image %s: %w", recipeName, err)
		}
		r.Files = append(r.Files[:len(r.Files):len(r.Files)], files...)
	}
	key := fmt.Sprintf("build %s %t", recipeName, force)
	m, err := s.flights.do(ctx, key, p, func(ctx context.Context, p domain.ProgressFunc) (*manifest, error) {
		m, err := s.build(ctx, recipeName, r, force, p)
		return m, s.explain("build image "+recipeName, err)
	})
	if err != nil {
		return domain.Image{}, err
	}
	return s.named(name, m)
}

func (s *Store) build(ctx context.Context, name string, r recipe, force bool, p domain.ProgressFunc) (_ *manifest, err error) {
	var d distro
	tool := "busybox"
	from := tool
	if !r.Busybox {
		if tool, err = bootstrapVersion(ctx); err != nil {
			return nil, err
		}
		if d, err = hostDistro("/"); err != nil {
			return nil, err
		}
		from = d.ID + " " + d.Codename
	}
	digest := r.digest(d, tool)
	if !force {
		if m, err := s.byRecipe(digest); m != nil || err != nil {
			return m, err
		}
	}
	st, err := s.stage()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, st.discard()) }()
	if r.Busybox {
		err = s.buildMinimal(ctx, st, p)
	} else {
		err = s.buildDistro(ctx, st, r, d, p)
	}
	if err != nil {
		return nil, err
	}
	if err := st.put(r.Files); err != nil {
		return nil, err
	}
	return s.publish(ctx, st, manifest{
		Source:       fmt.Sprintf("recipe %s (%s)", name, from),
		RecipeDigest: digest,
		Config:       r.Config,
		Extras:       r.extras(),
	}, p)
}

// byRecipe finds the newest image that a recipe made.
func (s *Store) byRecipe(digest string) (*manifest, error) {
	ms, err := s.manifests()
	if err != nil {
		return nil, err
	}
	for _, m := range ms {
		if m.RecipeDigest == digest {
			return m, nil
		}
	}
	return nil, nil
}
