package workspace

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// idLength is 8 characters of 5 bits: short enough for host names and socket
// paths, and a clash among 2^40 is drawn again.
const idLength = 8

// crockford is Crockford's base32 alphabet in lower case.
const crockford = "0123456789abcdefghjkmnpqrstvwxyz"

func newID() string {
	b := make([]byte, idLength)
	_, _ = rand.Read(b) // never fails: crypto/rand ends the program instead
	for i := range b {
		b[i] = crockford[b[i]&31]
	}
	return string(b)
}

// madeID reports whether s has the form of what newID returns.
func madeID(s string) bool { return len(s) == idLength && strings.Trim(s, crockford) == "" }

func newMachineID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}

// label is an RFC 1123 label, at most 63 characters.
var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func validName(name string) error {
	if !label.MatchString(name) {
		return fault.New(fault.Invalid, "workspace name %q is not valid", name).
			WithNext("Use 1 to 63 lower-case letters, digits and hyphens, beginning and ending with a letter or digit.")
	}
	return nil
}

// resolve finds the workspace that ref means: its name, its id, or an
// unambiguous prefix of its id, in this order.
func (s *Service) resolve(ref string) (*entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var fits []*entry
	for _, e := range s.entries {
		switch {
		case e.rec.Name == ref, e.rec.ID == ref:
			return e, nil
		case ref != "" && strings.HasPrefix(e.rec.ID, strings.ToLower(ref)):
			fits = append(fits, e)
		}
	}
	switch len(fits) {
	case 1:
		return fits[0], nil
	case 0:
		return nil, fault.New(fault.NotFound, "no workspace has the name or id %q", ref).
			WithNext("See `agentiso ls` for those that exist.")
	}
	var names []string
	for _, e := range fits {
		names = append(names, e.rec.ID+" ("+e.rec.Name+")")
	}
	slices.Sort(names)
	return nil, fault.New(fault.Ambiguous, "id prefix %q fits %d workspaces: %s", ref, len(fits), strings.Join(names, ", ")).
		WithNext("Give more characters of the id, or the name.")
}

// List returns copies of all records, oldest first.
func (s *Service) list() []*domain.Workspace {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*domain.Workspace, 0, len(s.entries))
	for _, e := range s.entries {
		all = append(all, clone(e.rec))
	}
	slices.SortFunc(all, func(a, b *domain.Workspace) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.ID, b.ID))
	})
	return all
}

// clone copies w so that the caller may keep and change it.
func clone(w *domain.Workspace) *domain.Workspace {
	c := *w
	c.Env = maps.Clone(w.Env)
	c.Slot.DNS = slices.Clone(w.Slot.DNS)
	c.Machine.Endpoint.Key = slices.Clone(w.Machine.Endpoint.Key)
	return &c
}
