package guest

import (
	"encoding/json"
	"net/http"

	"connectrpc.com/connect"

	"github.com/agentiso/agentiso/internal/guest/access"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// refuse answers 401 with the reason, in the form that a protocol has for it.
type refuse func(http.ResponseWriter, *http.Request, error)

// token lets a call through that shows the workspace's access token, or any
// when there is none.
func (s *Server) token(no refuse, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := access.CheckToken(r, s.opt.Identity.Current().AccessToken); err != nil {
			no(w, r, err)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// user finds the user of a call and puts it into the context.
func (s *Server) user(no refuse, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u, err := s.caller(r)
		if err != nil {
			no(w, r, err)
			return
		}
		h.ServeHTTP(w, r.WithContext(users.NewContext(r.Context(), u)))
	})
}

func (s *Server) caller(r *http.Request) (users.User, error) {
	name, err := access.User(r)
	if err != nil {
		return users.User{}, err
	}
	return s.lookup(name)
}

// lookup finds a user; the empty name is the default user.
func (s *Server) lookup(name string) (users.User, error) {
	if name == "" {
		name = s.opt.Identity.Current().DefaultUser
	}
	if name == "" {
		name = "root"
	}
	return s.opt.Accounts.Lookup(name)
}

func (s *Server) refuseConnect(w http.ResponseWriter, r *http.Request, err error) {
	if !s.errors.IsSupported(r) {
		refusePlain(w, r, err)
		return
	}
	_ = s.errors.Write(w, r, connect.NewError(connect.CodeUnauthenticated, err))
}

func refusePlain(w http.ResponseWriter, _ *http.Request, err error) {
	writeError(w, http.StatusUnauthorized, err.Error())
}

func writeError(w http.ResponseWriter, status int, msg string) {
	writeJSON(w, status, struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}{status, msg})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
