// Package files lets users of a workspace read and change its file tree: the
// filesystem service (Connect) and the plain HTTP calls below /files, through
// which contents travel. Names, codes and messages of the calls that existing
// sandbox SDK clients make are wire facts.
//
// Everything happens as the calling user, by [users.User.Do]: the kernel
// decides what is allowed, and this package never looks at permission bits. It
// does not authenticate Connect calls (package guest has put the user into the
// context) but does so for /files, where a signature may stand for the token.
//
// Contents stream: no call holds more than a few buffers of [bufferBytes],
// whatever the size of the file. Special files are refused, and what the
// kernel makes up while it is read (/proc, /sys) is read without trusting its
// size or waiting for more.
//
// # Overwriting
//
// An upload writes into the file of that name and does not replace it, so that
// owner, permissions, hard links, symbolic links and watches of an existing
// file hold, a full disk can take a smaller version, and files of /proc and
// /sys can be written. What this costs is bought back in part: uploads to one
// file take turns, one that cannot fit is refused before anything is touched,
// and one that breaks off leaves no half file: a new file is removed and an
// existing one is left empty.
//
// # Archives
//
// Two calls of our own move whole trees, for copying directories:
//
//	GET /files/archive?path=P[&username=U]
//
// answers a tar stream. If P is a directory, the entries are relative to it and
// the first is "./" itself; otherwise the one entry is P by its base name.
// Modes, symbolic links, hard links among the entries, modification times (in
// seconds) and numeric owners are kept; sockets, FIFOs and devices are left
// out. After an error in the middle the stream ends without the end mark of an
// archive, and the trailer X-Agentiso-Error says why.
//
//	POST /files/archive?path=P[&username=U]
//
// unpacks a tar stream (Content-Encoding gzip is accepted) into the directory
// P, made with its parents if need be, and answers {path, entries, bytes}.
// Existing directories are kept, existing files replaced. Entries belong to the
// calling user; those that root unpacks belong to the numeric owner in the
// archive. Absolute names, "..", devices, FIFOs, sparse files and writing
// through a symbolic link that leads out of P are refused with 400; what was
// unpacked before the error stays. The mode and time of "./" are applied only
// if the call made P.
//
// Lock order: Service.mu, then watcher.mu. No lock is held while a file is
// touched, but for the turn of an upload.
package files

import (
	"log/slog"
	"net/http"
	"sync"

	"github.com/agentiso/agentiso/internal/guest/users"
)

// bufferBytes is the unit in which contents move: large enough that the cost
// of a system call, and of becoming another user for it, does not show.
const bufferBytes = 256 << 10

// Options are what a [Service] needs of the agent.
type Options struct {
	// Lookup finds a user by name; "" is the default user. Unknown names are
	// [users.ErrUnknown].
	Lookup func(name string) (users.User, error)
	// Token is the workspace's access token, "" if none is asked for.
	Token func() string
	// Accounts give owners their names; the zero value reads the running
	// root's.
	Accounts users.DB
	Log      *slog.Logger
}

// Service implements filesystemconnect.FilesystemHandler and, as an
// http.Handler, /files and what is below it. Its methods may be called
// concurrently.
type Service struct {
	opt Options
	mux *http.ServeMux

	turns turns

	mu       sync.Mutex
	closed   bool
	watchers map[string]*polled // by id
	streams  map[*watcher]struct{}
}

// New returns a service. It holds watches until Close.
func New(opt Options) *Service {
	s := &Service{
		opt:      opt,
		watchers: map[string]*polled{},
		streams:  map[*watcher]struct{}{},
	}
	s.mux = http.NewServeMux()
	s.mux.HandleFunc("GET /files", s.download)
	s.mux.HandleFunc("POST /files", s.upload)
	s.mux.HandleFunc("POST /files/compose", s.compose)
	s.mux.HandleFunc("GET /files/archive", s.pack)
	s.mux.HandleFunc("POST /files/archive", s.unpack)
	return s
}

// ServeHTTP answers /files and what is below it.
func (s *Service) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Close ends all watches and waits for them. Calls in progress go on.
func (s *Service) Close() error {
	s.mu.Lock()
	s.closed = true
	var all []*watcher
	for _, p := range s.watchers {
		all = append(all, p.w)
	}
	for w := range s.streams {
		all = append(all, w)
	}
	s.watchers, s.streams = nil, nil
	s.mu.Unlock()
	for _, w := range all {
		w.close()
	}
	return nil
}

// buffers are lent to copies.
var buffers = sync.Pool{New: func() any { return new([bufferBytes]byte) }}
