package identity

import (
	"maps"
	"sync/atomic"
)

// Snapshot is the identity in force at one moment. It is read-only: Env is
// shared by everyone who has the snapshot.
type Snapshot struct {
	// Hostname is the last one that Configure set; "" before.
	Hostname string
	// Env is the default environment of every process.
	Env map[string]string
	// DefaultUser runs what names no user; never empty.
	DefaultUser string
	// Workdir is where processes start that name no directory; "" is the
	// user's home.
	Workdir string
	// AccessToken, when not empty, is required on user calls.
	AccessToken string
	// Configured is true from the first complete Configure on, and false
	// again while another one has changed something but not all.
	Configured bool
}

// Store holds the current Snapshot. Readers never wait.
type Store struct {
	cur atomic.Pointer[Snapshot]
}

// NewStore returns a Store that holds initial, which the caller must not change
// any more. An empty DefaultUser becomes root.
func NewStore(initial Snapshot) *Store {
	s := new(Store)
	s.set(initial)
	return s
}

// Current returns the identity in force.
func (s *Store) Current() Snapshot { return *s.cur.Load() }

func (s *Store) set(v Snapshot) {
	if v.DefaultUser == "" {
		v.DefaultUser = "root"
	}
	v.Env = maps.Clone(v.Env)
	s.cur.Store(&v)
}
