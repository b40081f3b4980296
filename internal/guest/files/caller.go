package files

import (
	"net/http"
	"net/url"
	"time"

	"github.com/agentiso/agentiso/internal/guest/access"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// caller finds out who calls a plain HTTP endpoint: the username of the query,
// else the user of the Authorization header, else the default user.
func (s *Service) caller(r *http.Request, query url.Values) (users.User, error) {
	name := query.Get("username")
	if name == "" {
		var err error
		if name, err = access.User(r); err != nil {
			return users.User{}, unauthorizedf("%v", err)
		}
	}
	return s.user(name)
}

// user finds a user by name; "" is the default user.
func (s *Service) user(name string) (users.User, error) {
	u, err := s.opt.Lookup(name)
	if err != nil {
		return users.User{}, unauthorizedf("%v", err)
	}
	return u, nil
}

// admit is caller for whoever holds the workspace's token or a signature for op
// on the path of the query.
func (s *Service) admit(r *http.Request, query url.Values, op string) (users.User, error) {
	if err := access.CheckFile(r, query, op, s.opt.Token(), time.Now()); err != nil {
		return users.User{}, unauthorizedf("%v", err)
	}
	return s.caller(r, query)
}
